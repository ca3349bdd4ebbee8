"""The page of a run, ``index.html``: what it says, its pictures, and the file itself."""

"""Every configuration key, described once: type, default, range, unit, meaning.

``conf/*.yaml`` stay the files that people read and copy, with their comments and their order; a
test compares them with these classes (generating them would lose what is written beside a key).
`check` refuses values; `nemo_warp.config` loads and merges them. Standard library only.
"""

"""What plugins register: found, checked, timed, and replaced if it fails. The built-in
eviction and scheduler policies."""

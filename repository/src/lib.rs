//! Deduplicated, compressed, encrypted store in the restic format.

//! Images for disaster recovery, as far as domains and repositories have to do with them.

pub mod get;
pub mod hold;

//! Images for disaster recovery, as far as domains, repositories and starts have to do with them.

pub mod again;
pub mod boot;
pub mod deploy;
pub mod get;
pub mod hold;
pub mod look;
pub mod update;

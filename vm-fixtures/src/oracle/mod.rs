//! The oracle: writes blocks that say where and when they belong, and judges which instant a disk shows.
//!
//! Every operation has a sequence number, one sequence over all disks of a load. Before it is issued
//! and after it is done a line goes to the log, so the log orders what happened. An instant is a
//! position in the log: everything done before it must be there, nothing issued after it may be, and
//! what was in flight may be either. [`judge`] finds the positions that explain every block.
//!
//! A discard is a hint: afterwards a block may hold zeros or what it held before.

mod block;
mod guest_load;
mod judge;
mod load;
mod log;
mod target;

pub use self::block::{BLOCK_LEN, BlockId, Content, encode, inspect};
pub use self::guest_load::RunningLoad;
pub use self::judge::{Defect, Verdict, judge, judge_image};
pub use self::load::{Load, Region};
pub use self::log::{Event, Kind, Log, Operation};
pub use self::target::{FileTarget, QemuIoTarget, Target};

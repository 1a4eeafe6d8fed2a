//! The calls of libvirt that the `virt` crate does not have, each a thin and safe function. The only
//! unsafe code of this program but for one call of the system, in `read::priority`.
//!
//! All of them block until libvirt answers. What libvirt says of an error is kept for each thread, so
//! it is read on the thread of the call.

#![allow(unsafe_code, reason = "C functions; each is called with pointers that outlive the call")]

use std::ffi::{CStr, CString};
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::raw::{c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::Once;
use std::time::Duration;

use nix::libc;
use virt::domain::Domain;
use virt::error::{Error, ErrorNumberEnum};
use virt_sys as sys;

use crate::hypervisor::GuestIo;

/// Keeps libvirt from printing errors by itself: they are returned, and printed once.
pub fn silence() {
    extern "C" fn ignore(_: *mut c_void, _: *mut sys::virError) {}
    static ONCE: Once = Once::new();
    // SAFETY: the handler is a function that lives as long as the program and touches nothing.
    ONCE.call_once(|| unsafe { sys::virSetErrorFunc(ptr::null_mut(), Some(ignore)) });
}

/// Starts a backup job and, where one is described, a checkpoint in the same instant
/// (`virDomainBackupBegin`).
///
/// # Errors
/// libvirt's. A checkpoint may exist all the same when the export was what failed.
pub fn backup_begin(domain: &Domain, backup: &str, checkpoint: Option<&str>) -> Result<(), Error> {
    let (backup, checkpoint) = (text(backup)?, checkpoint.map(text).transpose()?);
    let checkpoint = checkpoint.as_ref().map_or(ptr::null(), |text| text.as_ptr());
    // SAFETY: the domain is referenced by its wrapper, the texts live until the call returns.
    check(unsafe { sys::virDomainBackupBegin(domain.as_ptr(), backup.as_ptr(), checkpoint, 0) })
}

/// Gives libvirt a copy of a descriptor for a domain (`virDomainFDAssociate`): its XML may name it as
/// this `fdgroup` for as long as the connection lives.
///
/// # Errors
/// libvirt's; it has the call from 9.0 on.
pub fn fd_associate(domain: &Domain, group: &str, fd: BorrowedFd<'_>) -> Result<(), Error> {
    type Call =
        unsafe extern "C" fn(sys::virDomainPtr, *const c_char, c_uint, *mut c_int, c_uint) -> c_int;
    let group = text(group)?;
    // Looked up and not linked, for this program runs with libraries of libvirt that do not have it.
    // SAFETY: the name ends with a zero.
    let call = unsafe { libc::dlsym(libc::RTLD_DEFAULT, c"virDomainFDAssociate".as_ptr()) };
    if call.is_null() {
        return Err(Error::last_error());
    }
    // SAFETY: what libvirt has by this name is this function, for good.
    let call = unsafe { mem::transmute::<*mut c_void, Call>(call) };
    let mut fds = [fd.as_raw_fd()];
    // SAFETY: the domain is referenced by its wrapper; name and list live until the call returns, and
    // libvirt copies the descriptor.
    check(unsafe { call(domain.as_ptr(), group.as_ptr(), 1, fds.as_mut_ptr(), 0) })
}

/// The backup job that runs, as libvirt describes it; `None` where none does.
///
/// # Errors
/// libvirt's.
pub fn backup_xml(domain: &Domain) -> Result<Option<String>, Error> {
    // SAFETY: the domain is referenced by its wrapper; the answer is ours to free.
    match unsafe { owned(sys::virDomainBackupGetXMLDesc(domain.as_ptr(), 0)) } {
        Err(error) if is(&error, sys::VIR_ERR_NO_DOMAIN_BACKUP) => Ok(None),
        answer => answer.map(Some),
    }
}

/// Ends the job that runs.
///
/// # Errors
/// libvirt's.
pub fn abort_job(domain: &Domain) -> Result<(), Error> {
    // SAFETY: the domain is referenced by its wrapper.
    check(unsafe { sys::virDomainAbortJob(domain.as_ptr()) })
}

/// All checkpoints: the name of each and its description without the domain's. With `size` each disk
/// whose dirty bitmap is there and usable has an attribute of that name; the domain must run then.
///
/// # Errors
/// libvirt's.
pub fn checkpoints(domain: &Domain, size: bool) -> Result<Vec<(String, String)>, Error> {
    let mut list: *mut sys::virDomainCheckpointPtr = ptr::null_mut();
    // SAFETY: libvirt fills the pointer with an array that is ours to free.
    let count = unsafe { sys::virDomainListAllCheckpoints(domain.as_ptr(), &raw mut list, 0) };
    let count = usize::try_from(count).map_err(|_| Error::last_error())?;
    let flags = if size { sys::VIR_DOMAIN_CHECKPOINT_XML_SIZE } else { 0 };
    let mut checkpoints = Ok(Vec::with_capacity(count));
    for index in 0..count {
        // SAFETY: the array has `count` checkpoints; each is read before it is freed, and freed once.
        unsafe {
            let checkpoint = *list.add(index);
            if let Ok(found) = &mut checkpoints {
                let name = CStr::from_ptr(sys::virDomainCheckpointGetName(checkpoint));
                let name = name.to_string_lossy().into_owned();
                let flags = flags | sys::VIR_DOMAIN_CHECKPOINT_XML_NO_DOMAIN;
                match owned(sys::virDomainCheckpointGetXMLDesc(checkpoint, flags as c_uint)) {
                    Ok(xml) => found.push((name, xml)),
                    // Somebody has removed it meanwhile.
                    Err(error) if is(&error, sys::VIR_ERR_NO_DOMAIN_CHECKPOINT) => {}
                    Err(error) => checkpoints = Err(error),
                }
            }
            sys::virDomainCheckpointFree(checkpoint);
        }
    }
    // SAFETY: libvirt allocated the array with malloc.
    unsafe { libc_free(list.cast()) };
    checkpoints
}

/// Tells libvirt of a checkpoint whose dirty bitmaps are there already. With `validate` it refuses one
/// of which a bitmap is missing or broken.
///
/// # Errors
/// libvirt's; [`Refusal::is_inconsistent`] tells a bitmap that cannot be used.
pub fn checkpoint_redefine(domain: &Domain, xml: &str, validate: bool) -> Result<(), Error> {
    let xml = text(xml)?;
    let validate = if validate { sys::VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE_VALIDATE } else { 0 };
    let flags = sys::VIR_DOMAIN_CHECKPOINT_CREATE_REDEFINE | validate;
    // SAFETY: the domain is referenced by its wrapper, the text lives until the call returns; the
    // checkpoint that comes back is a reference of ours.
    unsafe {
        let checkpoint =
            sys::virDomainCheckpointCreateXML(domain.as_ptr(), xml.as_ptr(), flags as c_uint);
        if checkpoint.is_null() {
            return Err(Error::last_error());
        }
        sys::virDomainCheckpointFree(checkpoint);
    }
    Ok(())
}

/// Deletes a checkpoint: its dirty bitmaps and what libvirt knows of it, or only the latter. Returns
/// whether libvirt knew of it.
///
/// # Errors
/// libvirt's.
pub fn checkpoint_delete(domain: &Domain, name: &str, metadata_only: bool) -> Result<bool, Error> {
    let name = text(name)?;
    let flags = if metadata_only { sys::VIR_DOMAIN_CHECKPOINT_DELETE_METADATA_ONLY } else { 0 };
    // SAFETY: as above; the reference that the look-up returns is freed after its use.
    unsafe {
        let checkpoint = sys::virDomainCheckpointLookupByName(domain.as_ptr(), name.as_ptr(), 0);
        if checkpoint.is_null() {
            let error = Error::last_error();
            let gone = is(&error, sys::VIR_ERR_NO_DOMAIN_CHECKPOINT);
            return if gone { Ok(false) } else { Err(error) };
        }
        let deleted = check(sys::virDomainCheckpointDelete(checkpoint, flags as c_uint));
        sys::virDomainCheckpointFree(checkpoint);
        deleted.map(|()| true)
    }
}

/// Freezes the guest's file systems through its agent and returns how many.
///
/// # Errors
/// libvirt's, or what the agent says.
pub fn fs_freeze(domain: &Domain) -> Result<u64, Error> {
    // SAFETY: no mount points are given, which means all.
    count(unsafe { sys::virDomainFSFreeze(domain.as_ptr(), ptr::null_mut(), 0, 0) })
}

/// Thaws the guest's file systems and returns how many.
///
/// # Errors
/// libvirt's, or what the agent says.
pub fn fs_thaw(domain: &Domain) -> Result<u64, Error> {
    // SAFETY: no mount points are given, which means all.
    count(unsafe { sys::virDomainFSThaw(domain.as_ptr(), ptr::null_mut(), 0, 0) })
}

/// Sets how long libvirt waits for the agent, in seconds; `None` for as long as it takes, which is how
/// libvirt begins.
///
/// # Errors
/// libvirt's.
pub fn agent_timeout(domain: &Domain, seconds: Option<c_int>) -> Result<(), Error> {
    let seconds = seconds.unwrap_or(sys::VIR_DOMAIN_AGENT_RESPONSE_TIMEOUT_BLOCK);
    // SAFETY: the domain is referenced by its wrapper.
    check(unsafe { sys::virDomainAgentSetResponseTimeout(domain.as_ptr(), seconds, 0) })
}

/// Size in bytes of a disk as the guest sees it.
///
/// # Errors
/// libvirt's.
pub fn disk_size(domain: &Domain, target: &str) -> Result<u64, Error> {
    let target = text(target)?;
    let mut info = sys::virDomainBlockInfo { capacity: 0, allocation: 0, physical: 0 };
    // SAFETY: libvirt fills the structure that is passed.
    check(unsafe {
        sys::virDomainGetBlockInfo(domain.as_ptr(), target.as_ptr(), &raw mut info, 0)
    })?;
    Ok(info.capacity)
}

/// Adds up what the guest did on all its disks: reads, writes and flushes. Looks at no job: statistics of a backup job can end
/// libvirtd before libvirt 10.8.
///
/// # Errors
/// libvirt's.
pub fn block_stats(domain: &Domain) -> Result<[GuestIo; 3], Error> {
    /// The most that libvirt's protocol takes (`remote_protocol.x`); it has eight.
    const BLOCK_STATS_MAX: usize = 16;
    const ALL_DISKS: &CStr = c"";
    // To be told how many there are would cost QEMU, and its guest, as much as being told them.
    let mut params = [no_param(); BLOCK_STATS_MAX];
    let mut len = params.len() as c_int;
    // SAFETY: libvirt fills as many as there are, `len` at most, and says how many.
    check(unsafe {
        sys::virDomainBlockStatsFlags(
            domain.as_ptr(),
            ALL_DISKS.as_ptr(),
            params.as_mut_ptr(),
            &raw mut len,
            0,
        )
    })?;
    let mut kinds = [GuestIo::default(); 3];
    for param in params.iter().take(usize::try_from(len).unwrap_or(0)) {
        // SAFETY: libvirt ends the name with a zero; the type says which member is set.
        let (name, value) = unsafe {
            let value = match c_uint::try_from(param.type_) {
                Ok(sys::VIR_TYPED_PARAM_LLONG) => u64::try_from(param.value.l).unwrap_or(0),
                Ok(sys::VIR_TYPED_PARAM_ULLONG) => param.value.ul,
                _ => continue,
            };
            (CStr::from_ptr(param.field.as_ptr()), value)
        };
        let nanos = Duration::from_nanos;
        match name.to_bytes() {
            b"rd_operations" => kinds[0].operations = value,
            b"wr_operations" => kinds[1].operations = value,
            b"flush_operations" => kinds[2].operations = value,
            b"rd_total_times" => kinds[0].time = nanos(value),
            b"wr_total_times" => kinds[1].time = nanos(value),
            b"flush_total_times" => kinds[2].time = nanos(value),
            _ => {}
        }
    }
    Ok(kinds)
}

/// A job on one disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockJob {
    /// Whether it writes the image on top into the one beneath.
    pub commits_top: bool,
    /// Whether it writes any image into the one beneath.
    pub commits: bool,
    /// Bytes that are done.
    pub done: u64,
    /// All bytes.
    pub total: u64,
}

/// Begins to write the image on top of a disk into the one beneath it, at so many bytes a second at most
/// (0 for no limit). The guest stays on the upper one until [`block_job_end`].
///
/// # Errors
/// libvirt's.
pub fn commit_top(domain: &Domain, disk: &str, rate: u64) -> Result<(), Error> {
    let disk = text(disk)?;
    let flags = sys::VIR_DOMAIN_BLOCK_COMMIT_ACTIVE
        | sys::VIR_DOMAIN_BLOCK_COMMIT_SHALLOW
        | sys::VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES;
    // SAFETY: the domain is referenced by its wrapper, the text lives until the call returns; no base and
    // no top means the two images on top.
    check(unsafe {
        sys::virDomainBlockCommit(
            domain.as_ptr(),
            disk.as_ptr(),
            ptr::null(),
            ptr::null(),
            rate as _,
            flags as c_uint,
        )
    })
}

/// Begins to write an image of a disk that is not on top into the one right beneath it, at so many bytes a
/// second at most (0 for no limit). The job ends by itself.
///
/// # Errors
/// libvirt's.
pub fn commit_between(
    domain: &Domain,
    disk: &str,
    (base, top): (&str, &str),
    rate: u64,
) -> Result<(), Error> {
    let (disk, base, top) = (text(disk)?, text(base)?, text(top)?);
    let flags = sys::VIR_DOMAIN_BLOCK_COMMIT_BANDWIDTH_BYTES;
    // SAFETY: the domain is referenced by its wrapper, the texts live until the call returns.
    check(unsafe {
        sys::virDomainBlockCommit(
            domain.as_ptr(),
            disk.as_ptr(),
            base.as_ptr(),
            top.as_ptr(),
            rate as _,
            flags as c_uint,
        )
    })
}

/// The job on a disk, where one runs.
///
/// # Errors
/// libvirt's.
pub fn block_job(domain: &Domain, disk: &str) -> Result<Option<BlockJob>, Error> {
    let disk = text(disk)?;
    let mut info = sys::virDomainBlockJobInfo { type_: 0, bandwidth: 0, cur: 0, end: 0 };
    // SAFETY: libvirt fills the structure that is passed, where it returns 1.
    let found = count(unsafe {
        sys::virDomainGetBlockJobInfo(domain.as_ptr(), disk.as_ptr(), &raw mut info, 0)
    })?;
    let kind = u32::try_from(info.type_).ok();
    let commits_top = kind == Some(sys::VIR_DOMAIN_BLOCK_JOB_TYPE_ACTIVE_COMMIT);
    let commits = commits_top || kind == Some(sys::VIR_DOMAIN_BLOCK_JOB_TYPE_COMMIT);
    let (done, total) = (info.cur, info.end);
    Ok((found > 0).then_some(BlockJob { commits_top, commits, done, total }))
}

/// Ends the job on a disk: the guest goes on with the image beneath, where `pivot` says so, or with the
/// one on top.
///
/// # Errors
/// libvirt's.
pub fn block_job_end(domain: &Domain, disk: &str, pivot: bool) -> Result<(), Error> {
    let disk = text(disk)?;
    let flags = if pivot { sys::VIR_DOMAIN_BLOCK_JOB_ABORT_PIVOT } else { 0 };
    // SAFETY: the domain is referenced by its wrapper, the text lives until the call returns.
    check(unsafe { sys::virDomainBlockJobAbort(domain.as_ptr(), disk.as_ptr(), flags as c_uint) })
}

/// Limits of a disk's I/O in bytes a second: of all, of reads, of writes; 0 for none.
pub type IoLimits = [u64; 3];
const IO_LIMITS: [&CStr; 3] = [c"total_bytes_sec", c"read_bytes_sec", c"write_bytes_sec"];

/// The limits of a running domain's disk.
///
/// # Errors
/// libvirt's.
pub fn io_limits(domain: &Domain, disk: &str) -> Result<IoLimits, Error> {
    let disk = text(disk)?;
    let flags = sys::VIR_DOMAIN_AFFECT_LIVE as c_uint;
    let mut len: c_int = 0;
    let ask = |params, len: &mut c_int| {
        // SAFETY: without parameters libvirt says how many there are; with them it fills as many.
        check(unsafe {
            sys::virDomainGetBlockIoTune(domain.as_ptr(), disk.as_ptr(), params, len, flags)
        })
    };
    ask(ptr::null_mut(), &mut len)?;
    let mut params = vec![no_param(); usize::try_from(len).unwrap_or(0)];
    ask(params.as_mut_ptr(), &mut len)?;
    params.truncate(usize::try_from(len).unwrap_or(0));
    let limit = |name: &CStr| {
        let found = params.iter().find(|param| {
            // SAFETY: libvirt ends the name with a zero.
            unsafe { CStr::from_ptr(param.field.as_ptr()) == name }
        });
        // SAFETY: the three are unsigned and long, by libvirt's definition of their names.
        found.map_or(0, |param| unsafe { param.value.ul })
    };
    let limits = IO_LIMITS.map(limit);
    for param in &mut params {
        if c_uint::try_from(param.type_) == Ok(sys::VIR_TYPED_PARAM_STRING) {
            // SAFETY: a text is ours to free, once.
            unsafe { libc_free(param.value.s.cast()) };
        }
    }
    Ok(limits)
}

/// Sets the limits of a running domain's disk; others stay.
///
/// # Errors
/// libvirt's.
pub fn set_io_limits(domain: &Domain, disk: &str, limits: IoLimits) -> Result<(), Error> {
    let disk = text(disk)?;
    let mut params = IO_LIMITS.map(|name| {
        let mut param = no_param();
        for (to, from) in param.field.iter_mut().zip(name.to_bytes()) {
            *to = *from as c_char;
        }
        param.type_ = sys::VIR_TYPED_PARAM_ULLONG as c_int;
        param
    });
    for (param, limit) in params.iter_mut().zip(limits) {
        param.value.ul = limit;
    }
    let flags = sys::VIR_DOMAIN_AFFECT_LIVE as c_uint;
    // SAFETY: the parameters live until the call returns, and libvirt does not change them.
    check(unsafe {
        let (first, len) = (params.as_mut_ptr(), params.len() as c_int);
        sys::virDomainSetBlockIoTune(domain.as_ptr(), disk.as_ptr(), first, len, flags)
    })
}

fn no_param() -> sys::virTypedParameter {
    // SAFETY: a parameter is plain data, for which zeros are a value.
    unsafe { mem::zeroed() }
}

/// What libvirt says of a call that it refused, in its words.
#[derive(Debug, thiserror::Error)]
#[error("{}", .0.message())]
pub struct Refusal(Error);

impl From<Error> for Refusal {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl Refusal {
    /// Whether a dirty bitmap is missing or broken.
    pub fn is_inconsistent(&self) -> bool {
        is(&self.0, sys::VIR_ERR_CHECKPOINT_INCONSISTENT)
    }

    /// Whether libvirt does not understand, or cannot do, what it was asked for.
    pub fn is_of_the_request(&self) -> bool {
        let codes = [
            sys::VIR_ERR_NO_SUPPORT,
            sys::VIR_ERR_INVALID_ARG,
            sys::VIR_ERR_XML_ERROR,
            sys::VIR_ERR_XML_DETAIL,
            sys::VIR_ERR_XML_INVALID_SCHEMA,
            sys::VIR_ERR_CONFIG_UNSUPPORTED,
            sys::VIR_ERR_ARGUMENT_UNSUPPORTED,
            sys::VIR_ERR_OPERATION_UNSUPPORTED,
        ];
        codes.into_iter().any(|code| is(&self.0, code))
    }

    /// Whether the domain does not exist.
    pub fn is_no_domain(&self) -> bool {
        is_no_domain(&self.0)
    }

    /// Whether a storage pool or a volume of it does not exist.
    pub fn is_no_volume(&self) -> bool {
        is(&self.0, sys::VIR_ERR_NO_STORAGE_POOL) || is(&self.0, sys::VIR_ERR_NO_STORAGE_VOL)
    }

    /// Whether the domain does not run.
    pub fn is_not_running(&self) -> bool {
        is(&self.0, sys::VIR_ERR_OPERATION_INVALID) && self.0.message().contains("not running")
    }
}

/// Whether libvirt says that there is no such domain.
pub fn is_no_domain(error: &Error) -> bool {
    is(error, sys::VIR_ERR_NO_DOMAIN)
}

fn is(error: &Error, code: sys::virErrorNumber) -> bool {
    error.code() == ErrorNumberEnum::from_raw(code)
}

fn text(text: &str) -> Result<CString, Error> {
    Ok(CString::new(text)?)
}

fn check(returned: c_int) -> Result<(), Error> {
    if returned < 0 { Err(Error::last_error()) } else { Ok(()) }
}

fn count(returned: c_int) -> Result<u64, Error> {
    u64::try_from(returned).map_err(|_| Error::last_error())
}

/// Takes over a text that libvirt allocated.
///
/// # Safety
/// `returned` is null or a text that ends with a zero, allocated with malloc and used by nobody else.
unsafe fn owned(returned: *mut c_char) -> Result<String, Error> {
    if returned.is_null() {
        return Err(Error::last_error());
    }
    // SAFETY: as the caller promises.
    unsafe {
        let copy = CStr::from_ptr(returned).to_string_lossy().into_owned();
        libc_free(returned.cast());
        Ok(copy)
    }
}

unsafe extern "C" {
    /// `free(3)`.
    #[link_name = "free"]
    unsafe fn libc_free(pointer: *mut c_void);
}

//! The number of the process at the other end of a socket.

#![expect(unsafe_code, reason = "SO_PEERCRED")]

use std::io;
use std::mem::size_of;
use std::os::fd::{AsFd, AsRawFd};

/// The number of the process that connected; none if it cannot be seen from here (another PID namespace).
pub(crate) fn peer_of(socket: impl AsFd) -> io::Result<Option<rustix::process::Pid>> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut bytes = libc::socklen_t::try_from(size_of::<libc::ucred>()).unwrap_or(0);
    // SAFETY: both pointers are to locals, and `bytes` is the length of the first.
    let failed = unsafe {
        libc::getsockopt(
            socket.as_fd().as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut peer).cast(),
            &raw mut bytes,
        )
    };
    if failed != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(rustix::process::Pid::from_raw(peer.pid))
}

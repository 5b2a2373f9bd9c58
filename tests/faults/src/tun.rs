//! One end of a cable that this process carries: a network device whose packets are read from and written to a
//! descriptor (the kernel's Documentation/networking/tuntap.rst).

#![expect(unsafe_code, reason = "an ioctl that names a device")]

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};

use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// `TUNSETIFF`, `IFF_TUN` and `IFF_NO_PI` of `linux/if_tun.h`.
const TUNSETIFF: u64 = 0x4004_54ca;
const IFF_TUN: i16 = 1;
const IFF_NO_PI: i16 = 0x1000;

/// `struct ifreq`, of which a name and flags are said.
#[repr(C)]
struct Request {
    name: [u8; 16],
    flags: i16,
    rest: [u8; 22],
}

/// Takes the device `name` of `namespace`, which is there: each read is one IP packet that leaves, each write one that
/// arrives.
pub(crate) fn open(namespace: &File, name: &str) -> io::Result<File> {
    // Of the namespace of the thread that asks; it is not used for anything else.
    std::thread::scope(|scope| scope.spawn(|| open_here(namespace, name)).join())
        .unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn open_here(namespace: &File, name: &str) -> io::Result<File> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
    let device = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut request = Request { name: [0; 16], flags: IFF_TUN | IFF_NO_PI, rest: [0; 22] };
    request.name[..name.len()].copy_from_slice(name.as_bytes());
    // SAFETY: the request is as long as the kernel's, and lives through the call, which reads and writes it only.
    if unsafe { libc::ioctl(device.as_raw_fd(), TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    fcntl_setfl(&device, fcntl_getfl(&device)? | OFlags::NONBLOCK)?;
    Ok(device)
}

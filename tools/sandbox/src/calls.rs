//! Which system calls there are: a filter of seccomp (Documentation/userspace-api/seccomp_filter.rst).
//!
//! What is not allowed answers ENOSYS, as on a kernel that does not have it, and the kernel's audit log names it:
//! libraries know how to do without a call that the kernel lacks, and a machine that runs here must not end
//! because a library found a new one. With `deadly` the process ends instead, so that a test finds what was
//! forgotten.

#![expect(unsafe_code, reason = "seccomp with the flag that has refusals logged")]

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen::Qword, SeccompCmpOp,
    SeccompCondition, SeccompFilter, SeccompRule, TargetArch, sock_filter,
};

/// Allowed whatever their arguments are.
const PLAIN: &[libc::c_long] = &[
    // Files that are open, and paths, which landlock looks after.
    libc::SYS_read,
    libc::SYS_write,
    libc::SYS_readv,
    libc::SYS_writev,
    libc::SYS_pread64,
    libc::SYS_pwrite64,
    libc::SYS_preadv,
    libc::SYS_pwritev,
    libc::SYS_close,
    libc::SYS_close_range,
    libc::SYS_lseek,
    libc::SYS_fstat,
    libc::SYS_newfstatat,
    libc::SYS_statx,
    libc::SYS_fstatfs,
    libc::SYS_ftruncate,
    libc::SYS_fallocate,
    libc::SYS_fsync,
    libc::SYS_fdatasync,
    libc::SYS_sync_file_range,
    libc::SYS_flock,
    libc::SYS_dup,
    libc::SYS_dup3,
    libc::SYS_pipe2,
    libc::SYS_fchmod,
    libc::SYS_umask,
    libc::SYS_openat,
    libc::SYS_openat2,
    libc::SYS_getdents64,
    libc::SYS_mkdirat,
    libc::SYS_unlinkat,
    libc::SYS_renameat2,
    libc::SYS_renameat,
    libc::SYS_readlinkat,
    libc::SYS_faccessat,
    libc::SYS_faccessat2,
    libc::SYS_getcwd,
    // Memory; what makes it executable is below.
    libc::SYS_brk,
    libc::SYS_munmap,
    libc::SYS_mremap,
    libc::SYS_madvise,
    libc::SYS_mincore,
    libc::SYS_msync,
    libc::SYS_memfd_create,
    libc::SYS_userfaultfd,
    libc::SYS_membarrier,
    // Threads of this process.
    libc::SYS_futex,
    libc::SYS_futex_waitv,
    libc::SYS_set_robust_list,
    libc::SYS_get_robust_list,
    libc::SYS_set_tid_address,
    libc::SYS_rseq,
    libc::SYS_gettid,
    libc::SYS_sched_yield,
    libc::SYS_sched_getaffinity,
    libc::SYS_getpriority,
    libc::SYS_setpriority,
    libc::SYS_getcpu,
    libc::SYS_exit,
    libc::SYS_exit_group,
    libc::SYS_restart_syscall,
    libc::SYS_rt_sigaction,
    libc::SYS_rt_sigprocmask,
    libc::SYS_rt_sigpending,
    libc::SYS_rt_sigtimedwait,
    libc::SYS_rt_sigsuspend,
    libc::SYS_rt_sigreturn,
    libc::SYS_sigaltstack,
    // Waiting, and time.
    libc::SYS_epoll_create1,
    libc::SYS_epoll_ctl,
    libc::SYS_epoll_pwait,
    libc::SYS_epoll_pwait2,
    libc::SYS_ppoll,
    libc::SYS_pselect6,
    libc::SYS_eventfd2,
    libc::SYS_timerfd_create,
    libc::SYS_timerfd_settime,
    libc::SYS_timerfd_gettime,
    libc::SYS_nanosleep,
    libc::SYS_clock_nanosleep,
    libc::SYS_clock_gettime,
    libc::SYS_clock_getres,
    libc::SYS_gettimeofday,
    // Sockets that are there; `connect` is not here.
    libc::SYS_bind,
    libc::SYS_listen,
    libc::SYS_accept,
    libc::SYS_accept4,
    libc::SYS_getsockname,
    libc::SYS_getpeername,
    libc::SYS_setsockopt,
    libc::SYS_getsockopt,
    libc::SYS_shutdown,
    libc::SYS_sendto,
    libc::SYS_sendmsg,
    libc::SYS_sendmmsg,
    libc::SYS_recvfrom,
    libc::SYS_recvmsg,
    libc::SYS_recvmmsg,
    // Who and where this is.
    libc::SYS_getpid,
    libc::SYS_getppid,
    libc::SYS_getuid,
    libc::SYS_geteuid,
    libc::SYS_getgid,
    libc::SYS_getegid,
    libc::SYS_getrandom,
    libc::SYS_getrusage,
    libc::SYS_sysinfo,
    libc::SYS_uname,
    // Answered by a filter of its own.
    libc::SYS_clone3,
];

/// Older names of some of the above.
#[cfg(target_arch = "x86_64")]
const OLD: &[libc::c_long] = &[
    libc::SYS_open,
    libc::SYS_stat,
    libc::SYS_lstat,
    libc::SYS_access,
    libc::SYS_mkdir,
    libc::SYS_rmdir,
    libc::SYS_unlink,
    libc::SYS_rename,
    libc::SYS_readlink,
    libc::SYS_getdents,
    libc::SYS_dup2,
    libc::SYS_poll,
    libc::SYS_epoll_wait,
    libc::SYS_time,
    libc::SYS_getrlimit,
];
#[cfg(not(target_arch = "x86_64"))]
const OLD: &[libc::c_long] = &[];

/// `ioctl` requests of a kind: the second byte. KVM's (0xae) and userfaultfd's (0xaa).
const KINDS: [u64; 2] = [0xae00, 0xaa00];
/// Other requests: `PAGEMAP_SCAN` of `linux/fs.h`; what the standard library and a terminal's width need.
const REQUESTS: [u64; 6] =
    [0xc060_6610, libc::FIONBIO, libc::FIOCLEX, libc::FIONREAD, libc::TCGETS, libc::TIOCGWINSZ];
/// `PR_SET_VMA` of `linux/prctl.h`: names for memory.
const PR_SET_VMA: u64 = 0x5356_4d41;

/// Applies to all threads there are and will be.
pub(crate) fn restrict(deadly: bool) -> Result<(), String> {
    // Its flags are in memory, where no filter sees them; libc then takes `clone`.
    let clone3 = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let lacking = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
    let refused = if deadly { SeccompAction::KillProcess } else { lacking.clone() };
    let programs = program(clone3, SeccompAction::Allow, lacking)
        .and_then(|clone3| Ok([clone3, program(allowed()?, refused, SeccompAction::Allow)?]));
    let programs = programs.map_err(|e| e.to_string())?;
    programs.iter().try_for_each(|program| apply(program)).map_err(|e| e.to_string())
}

/// Instead of a descriptor: -10000, as the kernel sees it.
const PIDFD_SELF: u64 = 0xffff_d8f0;

type Rules = BTreeMap<libc::c_long, Vec<SeccompRule>>;

fn program(
    rules: Rules,
    otherwise: SeccompAction,
    then: SeccompAction,
) -> Result<BpfProgram, BackendError> {
    let arch = TargetArch::try_from(std::env::consts::ARCH)?;
    SeccompFilter::new(rules, otherwise, then, arch)?.try_into()
}

fn allowed() -> Result<Rules, BackendError> {
    let is = |at: u8, value: u64| SeccompCondition::new(at, Qword, SeccompCmpOp::Eq, value);
    let has = |at: u8, mask: u64, value: u64| {
        SeccompCondition::new(at, Qword, SeccompCmpOp::MaskedEq(mask), value)
    };
    // The kernel does not look at the upper half of an `int`.
    let int = |at: u8, value: u64| has(at, 0xffff_ffff, value);
    let number = |small: libc::c_int| u64::from(small.unsigned_abs());

    let mut ioctl = Vec::new();
    for kind in KINDS {
        ioctl.push(vec![has(1, 0xff00, kind)?]);
    }
    for request in REQUESTS {
        ioctl.push(vec![int(1, request)?]);
    }
    let local = vec![int(0, number(libc::AF_UNIX))?, has(1, 0xf, number(libc::SOCK_STREAM))?];
    let mut socket = vec![local.clone()];
    for family in [libc::AF_INET, libc::AF_INET6] {
        for protocol in [0, libc::IPPROTO_UDP] {
            let datagrams = has(1, 0xf, number(libc::SOCK_DGRAM))?;
            socket.push(vec![int(0, number(family))?, datagrams, int(2, number(protocol))?]);
        }
    }
    // A thread of this process, and no process.
    let thread = number(libc::CLONE_THREAD);
    let clone = vec![vec![has(0, thread, thread)?]];
    let executable = number(libc::PROT_EXEC);
    let mut prctl = Vec::new();
    for name in [number(libc::PR_SET_NAME), number(libc::PR_GET_NAME), PR_SET_VMA] {
        prctl.push(vec![int(0, name)?]);
    }
    let mut fcntl = Vec::new();
    for of_a_file in
        [libc::F_DUPFD_CLOEXEC, libc::F_GETFD, libc::F_SETFD, libc::F_GETFL, libc::F_SETFL]
    {
        fcntl.push(vec![int(1, number(of_a_file))?]);
    }
    let some = [
        (libc::SYS_ioctl, ioctl),
        (libc::SYS_socket, socket),
        (libc::SYS_socketpair, vec![local]),
        (libc::SYS_clone, clone),
        (libc::SYS_mmap, vec![vec![has(2, executable, 0)?]]),
        (libc::SYS_mprotect, vec![vec![has(1, executable, 0)?]]),
        // Of this process (`PIDFD_SELF`), whose memory is given back.
        (libc::SYS_process_madvise, vec![vec![int(0, PIDFD_SELF)?]]),
        (libc::SYS_prctl, prctl),
        (libc::SYS_fcntl, fcntl),
        // Limits are read, and not set.
        (libc::SYS_prlimit64, vec![vec![is(2, 0)?]]),
        (libc::SYS_tgkill, vec![vec![int(0, u64::from(std::process::id()))?]]),
    ];
    let mut rules: Rules = PLAIN.iter().chain(OLD).map(|call| (*call, Vec::new())).collect();
    for (call, any_of) in some {
        let any_of = any_of.into_iter().map(SeccompRule::new).collect::<Result<_, _>>()?;
        rules.insert(call, any_of);
    }
    Ok(rules)
}

fn apply(program: &[sock_filter]) -> io::Result<()> {
    // What seccompiler would do, and the flag that has refusals logged.
    // SAFETY: the call takes numbers.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let len = libc::c_ushort::try_from(program.len()).map_err(io::Error::other)?;
    let program = libc::sock_fprog { len, filter: program.as_ptr().cast_mut().cast() };
    let flags = libc::SECCOMP_FILTER_FLAG_TSYNC | libc::SECCOMP_FILTER_FLAG_LOG;
    // SAFETY: the kernel reads `len` instructions of the kernel's own form (`sock_filter` is laid out as the
    // kernel's), and copies them.
    let failed = unsafe {
        libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, flags, &raw const program)
    };
    match failed {
        0 => Ok(()),
        // With this flag, a positive number is a thread that could not be brought along.
        1.. => Err(io::Error::other("a thread has a filter of its own")),
        _ => Err(io::Error::last_os_error()),
    }
}

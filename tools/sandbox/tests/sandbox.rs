//! What a confined process cannot do, tried in processes of their own: a test that confined its own would take
//! the others along.

#![expect(unsafe_code, reason = "system calls that no library would make")]

use std::fs;
use std::io::Write;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::Command;

use ferry_sandbox::{Confined, Demand, Needs, confine};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, socket};
use rustix::process::{Signal, chroot, getpid, kill_process};

/// Names what a process tries; without it, this program starts a process for each of [`TRIES`].
const TRY: &str = "FERRY_SANDBOX_TRY";

type Attempt = fn(&Path);

/// Rules, and what tries to break them.
const TRIES: [(&str, Attempt); 7] = [
    ("files_that_were_not_named_cannot_be_opened", files),
    ("no_program_no_trace_no_signal_no_other_socket_no_executable_memory", calls),
    ("control_sockets_of_other_processes_cannot_be_reached", peers),
    ("the_kernel_says_that_it_is_confined_and_has_no_capability_to_speak_of", status),
    ("a_process_with_threads_is_refused_as_they_would_keep_what_others_give_up", late),
    ("a_path_that_is_not_there_is_named", missing),
    (DEADLY, deadly),
];
const DEADLY: &str = "a_deadly_filter_ends_the_process_at_a_call_that_was_given_up";

fn main() {
    if let Some(name) = std::env::var_os(TRY) {
        let dir = std::env::current_dir().expect("a directory");
        let (_, attempt) = TRIES.iter().find(|(known, _)| name == *known).expect("a name of these");
        attempt(&dir);
        println!("tried");
        return;
    }
    // As `cargo test NAME` has it.
    let wanted = std::env::args().nth(1).filter(|word| !word.starts_with('-')).unwrap_or_default();
    let tries = TRIES.iter().filter(|(name, _)| name.contains(&wanted));
    let failed = tries.filter(|(name, _)| !holds(name)).count();
    assert_eq!(failed, 0, "rules that do not hold");
}

fn holds(name: &str) -> bool {
    let dir = tempfile::tempdir().expect("a directory");
    fs::create_dir(dir.path().join("own")).expect("made");
    fs::write(dir.path().join("secret"), "secret").expect("written");
    let this = std::env::current_exe().expect("this program's file");
    let done = Command::new(this).current_dir(dir.path()).env(TRY, name).output();
    let done = done.expect("it starts");
    let said = String::from_utf8_lossy(&done.stdout);
    let held = match name {
        DEADLY => said == "alive" && done.status.signal() == Some(libc::SIGSYS),
        _ => said == "tried\n" && done.status.success(),
    };
    println!("test {name} ... {}", if held { "ok" } else { "FAILED" });
    if !held {
        println!("{done:?}");
    }
    held
}

/// Confines this process to the directory `own` in `dir`.
fn confined(dir: &Path, demand: Demand) -> &'static Confined {
    let needs =
        Needs { read: vec!["/proc/self".into()], write: vec![dir.join("own")], ..Needs::default() };
    confine(&needs, demand).expect("it is confined")
}

#[track_caller]
fn no_such_call<T>(result: std::io::Result<T>) {
    assert_eq!(result.err().and_then(|e| e.raw_os_error()), Some(Errno::NOSYS.raw_os_error()));
}

#[track_caller]
fn denied<T>(result: std::io::Result<T>) {
    assert_eq!(result.err().and_then(|e| e.raw_os_error()), Some(Errno::ACCESS.raw_os_error()));
}

fn files(dir: &Path) {
    assert!(confined(dir, Demand::All).is_whole());
    denied(fs::read("/etc/passwd"));
    denied(fs::read_dir("/"));
    denied(fs::read(dir.join("secret")));
    denied(fs::write(dir.join("new"), "x"));
    // Not by way of what is allowed.
    denied(fs::read(dir.join("own/../secret")));
    denied(fs::read("/proc/self/root/etc/passwd"));
    fs::write(dir.join("own/new"), "x").expect("its own");
    fs::rename(dir.join("own/new"), dir.join("own/newer")).expect("its own");
    fs::remove_file(dir.join("own/newer")).expect("its own");
    UnixListener::bind(dir.join("own/socket")).expect("its own");
    fs::read("/proc/self/maps").expect("allowed");
}

fn calls(dir: &Path) {
    confined(dir, Demand::All);
    let of = |errno: Errno| std::io::Error::from(errno);
    no_such_call(Command::new("/bin/true").spawn());
    no_such_call(ptrace());
    no_such_call(kill_process(getpid(), Signal::CONT).map_err(of));
    no_such_call(chroot("/").map_err(of));
    no_such_call(executable());
    for family in [AddressFamily::PACKET, AddressFamily::NETLINK, AddressFamily::VSOCK] {
        no_such_call(socket(family, SocketType::RAW, None).map_err(of));
    }
    no_such_call(socket(AddressFamily::INET, SocketType::RAW, None).map_err(of));
    UdpSocket::bind("127.0.0.1:0").expect("datagrams");
    let thread = std::thread::spawn(|| {
        no_such_call(ptrace());
        denied(fs::read("/etc/passwd"));
    });
    thread.join().expect("threads are started, and confined");
}

fn peers(dir: &Path) {
    let others = UnixListener::bind(dir.join("own/others")).expect("a socket");
    confined(dir, Demand::All);
    no_such_call(UnixStream::connect(dir.join("own/others")));
    no_such_call(TcpStream::connect("127.0.0.1:9"));
    no_such_call(TcpListener::bind("127.0.0.1:0"));
    drop(others);
}

fn status(dir: &Path) {
    confined(dir, Demand::All);
    let status = fs::read_to_string("/proc/self/status").expect("allowed");
    let of = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.expect("a line").trim_start_matches(':').trim().to_owned()
    };
    assert_eq!(of("Seccomp"), "2");
    assert_eq!(of("NoNewPrivs"), "1");
    let held = u64::from_str_radix(&of("CapPrm"), 16).expect("a number");
    // SYS_ADMIN, SYS_MODULE, SYS_RAWIO, SETUID, CHOWN.
    for capability in [21, 16, 17, 7, 0] {
        assert_eq!(held >> capability & 1, 0, "{held:x}");
    }
}

fn late(_: &Path) {
    let (stop, stopped) = std::sync::mpsc::channel::<()>();
    let thread = std::thread::spawn(move || stopped.recv().is_err());
    let refused = confine(&Needs::default(), Demand::Best).expect_err("two threads");
    assert!(refused.to_string().contains("2 threads"), "{refused}");
    drop(stop);
    thread.join().expect("it ended");
}

fn missing(_: &Path) {
    let needs = Needs { read: vec!["/nowhere".into()], ..Needs::default() };
    let refused = confine(&needs, Demand::Best).expect_err("no such path");
    assert!(refused.to_string().contains("/nowhere"), "{refused}");
}

fn deadly(dir: &Path) {
    confined(dir, Demand::Deadly);
    print!("alive");
    std::io::stdout().flush().expect("said");
    let _ = ptrace();
}

/// Asks to be traced by the parent.
fn ptrace() -> std::io::Result<()> {
    // SAFETY: the request takes no pointers.
    match unsafe { libc::ptrace(libc::PTRACE_TRACEME, 0, 0, 0) } {
        0 => Ok(()),
        _ => Err(std::io::Error::last_os_error()),
    }
}

/// Asks for memory to which code could be written.
fn executable() -> std::io::Result<()> {
    let protection = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    // SAFETY: a new mapping where the kernel likes, which nobody uses.
    match unsafe { libc::mmap(std::ptr::null_mut(), 4096, protection, flags, -1, 0) } {
        libc::MAP_FAILED => Err(std::io::Error::last_os_error()),
        _ => Ok(()),
    }
}

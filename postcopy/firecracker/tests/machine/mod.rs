//! The process that plays Firecracker, and what a test says to it.
//!
//! A `Session` is a pager in a thread of the test and the machine as a process: this test's program again,
//! which runs `main`. Each scenario of the machine ends well only if all that it read was right.

#![allow(unreachable_pub, reason = "a module of tests")]

use std::io::{BufRead, BufReader, IoSlice, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;

use ferry_firecracker::{Door, PagerError, Report};
use rustix::event::{EventfdFlags, eventfd};
use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};
use userfaultfd::{FeatureFlags, RegisterMode, Uffd, UffdBuilder};

use crate::snapshot::{PAGES, REGIONS, Snapshot, word};

const SOCKET: &str = "FERRY_TEST_SOCKET";
const SCENARIO: &str = "FERRY_TEST_SCENARIO";
const HUGE: usize = 2 << 20;

type Served = Result<Option<Report>, PagerError>;

pub struct Session {
    pager: Option<JoinHandle<Served>>,
    stop: Arc<OwnedFd>,
    machine: Child,
    says: BufReader<ChildStdout>,
    _dir: tempfile::TempDir,
}

impl Session {
    pub fn start(snapshot: &Snapshot, scenario: &str, ahead: bool) -> Self {
        Self::start_after(snapshot, scenario, ahead, || {})
    }

    /// `then` runs when the snapshot is open, before the machine comes.
    pub fn start_after(
        snapshot: &Snapshot,
        scenario: &str,
        ahead: bool,
        then: impl FnOnce(),
    ) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("socket");
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC).unwrap());
        let (door, memory) = (Door::open(&socket).unwrap(), snapshot.memory());
        then();
        let pager = std::thread::spawn({
            let stop = stop.clone();
            move || door.serve(&memory, ahead, stop.as_fd())
        });
        let mut machine = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "plays_firecracker", "--ignored", "--nocapture"])
            .envs([(SOCKET, socket.to_str().unwrap()), (SCENARIO, scenario)])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let says = BufReader::new(machine.stdout.take().unwrap());
        Self { pager: Some(pager), stop, machine, says, _dir: dir }
    }

    /// Waits until the machine says `word`.
    pub fn wait_for(&mut self, word: &str) {
        let mut line = String::new();
        while !line.trim_end().ends_with(word) {
            line.clear();
            assert!(self.says.read_line(&mut line).unwrap() > 0, "the machine never said {word}");
        }
    }

    /// Lets a machine that waits for it go on.
    pub fn go_on(&mut self) {
        self.machine.stdin.as_mut().unwrap().write_all(b"go on\n").unwrap();
    }

    /// Asks the pager to stop, so many times.
    pub fn stop(&self, times: u64) {
        rustix::io::write(&self.stop, &times.to_ne_bytes()).unwrap();
    }

    pub fn pager_runs(&self) -> bool {
        self.pager.as_ref().is_some_and(|pager| !pager.is_finished())
    }

    /// What the pager says when it has ended.
    pub fn pager(&mut self) -> Served {
        self.pager.take().unwrap().join().unwrap()
    }

    /// How the machine ended.
    pub fn machine(&mut self) -> ExitStatus {
        self.machine.wait().unwrap()
    }

    pub fn machine_ends_well(&mut self) {
        let status = self.machine();
        assert!(status.success(), "{status}");
    }

    pub fn kill_machine(&mut self) {
        self.machine.kill().unwrap();
        self.machine.wait().unwrap();
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Of a test that failed: nothing shall wait for it.
        let _ = self.machine.kill();
        let _ = self.machine.wait();
    }
}

/// Connects from this process and sends `text` with `fds`; what the pager says to that.
pub fn hand_over_to_pager(snapshot: &Snapshot, text: &str, fds: &[BorrowedFd<'_>]) -> PagerError {
    let dir = tempfile::tempdir().unwrap();
    let socket = dir.path().join("socket");
    let stop = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
    let (door, memory) = (Door::open(&socket).unwrap(), snapshot.memory());
    std::thread::scope(|scope| {
        let pager = scope.spawn(|| door.serve(&memory, true, stop.as_fd()));
        let stream = UnixStream::connect(&socket).unwrap();
        if !text.is_empty() {
            // The pager may have seen enough before all of it was sent.
            let _ = send(&stream, text, fds);
        }
        drop(stream);
        pager.join().unwrap().unwrap_err()
    })
}

fn send(stream: &UnixStream, text: &str, fds: &[BorrowedFd<'_>]) -> rustix::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() {
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
    }
    let parts = [IoSlice::new(text.as_bytes())];
    let mut sent = sendmsg(stream, &parts, &mut control, SendFlags::NOSIGNAL)?;
    while sent < text.len() {
        sent += rustix::net::send(stream, &text.as_bytes()[sent..], SendFlags::NOSIGNAL)?;
    }
    Ok(())
}

/// The whole life of the process that plays Firecracker.
pub fn main() {
    let socket = std::env::var(SOCKET).expect("started by another test");
    let scenario = std::env::var(SCENARIO).unwrap();
    let huge = scenario == "huge";
    let memory = Mapped::new(huge);
    // Kept open to the end, as Firecracker keeps it.
    let uffd = memory.watch();
    let stream = hand_over(Path::new(&socket), memory, &uffd, huge);
    match scenario.as_str() {
        "touch" => memory.touch_all(),
        "huge" => {
            memory.touch_all();
            memory.give_back(512, 512);
            (512..1024).for_each(|page| memory.check_zero(page));
            memory.check(1024);
        }
        "first" => (0..100).for_each(|page| memory.check(page)),
        "balloon" => memory.balloon(),
        "alone" => {
            // Older versions close the connection at once: it says nothing about the machine.
            drop(stream);
            memory.check(5);
            println!("ready");
            std::io::stdin().lock().read_line(&mut String::new()).unwrap();
            (0..PAGES).rev().for_each(|page| memory.check(page));
            memory.give_back(0, 64);
            (0..64).for_each(|page| memory.check_zero(page));
            memory.check(64);
        }
        other => panic!("no scenario {other}"),
    }
}

/// Firecracker's `send_uffd_handshake`.
fn hand_over(socket: &Path, memory: Mapped, uffd: &Uffd, huge: bool) -> UnixStream {
    let page_size = if huge { HUGE } else { 4096 };
    let (mut regions, mut offset) = (Vec::new(), 0);
    for (host, pages) in memory.0.into_iter().zip(REGIONS) {
        regions.push(serde_json::json!({
            "base_host_virt_addr": host, "size": pages * 4096, "offset": offset,
            "page_size": page_size, "page_size_kib": page_size,
        }));
        offset += pages * 4096;
    }
    let stream = UnixStream::connect(socket).unwrap();
    let text = serde_json::to_string(&regions).unwrap();
    // SAFETY: the descriptor is open as long as `uffd` is borrowed.
    let fd = unsafe { BorrowedFd::borrow_raw(uffd.as_raw_fd()) };
    send(&stream, &text, &[fd]).unwrap();
    stream
}

/// The machine's memory: where each region begins.
#[derive(Clone, Copy)]
struct Mapped([usize; 2]);

impl Mapped {
    /// The second region lies below the first, with a hole between them.
    fn new(huge: bool) -> Self {
        let [first, second] = REGIONS.map(bytes);
        let hole = 512 * 4096;
        let flags = libc::MAP_PRIVATE
            | libc::MAP_ANONYMOUS
            | if huge { libc::MAP_HUGETLB } else { libc::MAP_NORESERVE };
        let map = |bytes| {
            let access = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: a new mapping where the kernel chooses.
            let at = unsafe { libc::mmap(std::ptr::null_mut(), bytes, access, flags, -1, 0) };
            assert_ne!(at, libc::MAP_FAILED, "{}", std::io::Error::last_os_error());
            at.expose_provenance()
        };
        if huge {
            return Self([map(first), map(second)]);
        }
        let base = map(second + hole + first);
        Self([base + second + hole, base])
    }

    fn watch(self) -> Uffd {
        // User mode only: no system call touches the memory in these tests, and anybody may ask for it.
        let uffd = UffdBuilder::new()
            .close_on_exec(true)
            .non_blocking(true)
            .user_mode_only(true)
            .require_features(FeatureFlags::EVENT_REMOVE)
            .create()
            .unwrap();
        for (host, pages) in self.0.into_iter().zip(REGIONS) {
            let at = std::ptr::with_exposed_provenance_mut(host);
            uffd.register_with_mode(at, bytes(pages), RegisterMode::MISSING).unwrap();
        }
        uffd
    }

    fn address(self, page: u64) -> *mut u64 {
        let [first, second] = self.0;
        std::ptr::with_exposed_provenance_mut(match page.checked_sub(REGIONS[0]) {
            None => first + bytes(page),
            Some(page) => second + bytes(page),
        })
    }

    /// First and last word of a page.
    fn words(self, page: u64) -> [u64; 2] {
        let at = self.address(page);
        // SAFETY: a page of the mapping.
        unsafe { [at.read_volatile(), at.add(511).read_volatile()] }
    }

    fn check(self, page: u64) {
        assert_eq!(self.words(page), [word(page).unwrap_or(0); 2], "page {page}");
    }

    fn check_zero(self, page: u64) {
        assert_eq!(self.words(page), [0; 2], "page {page} was given back");
    }

    fn write(self, page: u64, value: u64) {
        let at = self.address(page);
        // SAFETY: a page of the mapping, which no other thread writes.
        unsafe {
            at.write_volatile(value);
            at.add(511).write_volatile(value);
        }
    }

    /// As the balloon does.
    fn give_back(self, page: u64, pages: u64) {
        let at = self.address(page).cast();
        // SAFETY: pages of the mapping, of one region.
        let failed = unsafe { libc::madvise(at, bytes(pages), libc::MADV_DONTNEED) };
        assert_eq!(failed, 0, "{}", std::io::Error::last_os_error());
    }

    /// Threads touch all pages, each from another place on and with another step.
    fn touch_all(self) {
        std::thread::scope(|scope| {
            for thread in 0..4 {
                scope.spawn(move || {
                    // An odd step comes to every page.
                    let page = |n: u64| (thread * PAGES / 4 + n * (2 * thread + 1)) % PAGES;
                    (0..PAGES).for_each(|n| self.check(page(n)));
                });
            }
        });
    }

    /// Threads touch, write and give back, each among pages of its own, which lie between the others'.
    fn balloon(self) {
        const THREADS: u64 = 4;
        const SPAN: u64 = 8;
        std::thread::scope(|scope| {
            for thread in 0..THREADS {
                scope.spawn(move || {
                    let mut dice = thread + 1;
                    let mut known: Vec<u64> = (0..PAGES).map(|p| word(p).unwrap_or(0)).collect();
                    let index = |page: u64| usize::try_from(page).unwrap();
                    for _ in 0..4000 {
                        // Marsaglia's xorshift64.
                        dice ^= dice << 13;
                        dice ^= dice >> 7;
                        dice ^= dice << 17;
                        let span = (dice >> 8) % (PAGES / SPAN / THREADS) * THREADS + thread;
                        let (page, after) = (span * SPAN + (dice >> 32) % SPAN, (span + 1) * SPAN);
                        match dice % 4 {
                            0 => {
                                self.give_back(page, after - page);
                                known[index(page)..index(after)].fill(0);
                            }
                            1 => {
                                self.write(page, dice);
                                known[index(page)] = dice;
                            }
                            _ => assert_eq!(self.words(page), [known[index(page)]; 2], "{page}"),
                        }
                    }
                });
            }
        });
    }
}

fn bytes(pages: u64) -> usize {
    usize::try_from(pages).unwrap() * 4096
}

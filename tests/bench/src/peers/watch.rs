//! Looks at a guest and at the processes that host it, from outside and the same for every VMM: the guest's
//! status page through `/proc/PID/mem`, CPU time by the kernel's clocks.
//!
//! Looking changes nothing: only a page that is there is read. (To read one that is not would place one of
//! zeros, and the post-copy of a VMM fails to place its own.)
//!
//! The thread that looks runs before all others, so that a busy machine does not make it blind.

#![expect(
    unsafe_code,
    reason = "CPU clocks of other processes and real-time priority have no safe call"
)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ferry_guest::status::{self, Stalls, State, StatusView};

use crate::Failure;
use crate::trace::{End, Look};

/// Between two looks at a guest that moves, and at one that only has to begin.
pub(crate) const OFTEN: Duration = Duration::from_micros(250);
pub(crate) const SELDOM: Duration = Duration::from_millis(20);
/// Between two looks at processes.
const COUNT: Duration = Duration::from_millis(20);

/// A process that hosts the guest or takes part in its move.
#[derive(Clone, Copy)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    /// Where its guest is, if it has one.
    pub(crate) end: Option<End>,
}

/// What a process used, as last seen.
#[derive(Clone, Copy, Debug, Default)]
struct Used {
    cpu: Duration,
    vcpus: Duration,
    resident_bytes: u64,
}

#[derive(Default)]
struct Inner {
    processes: Vec<(Process, Used)>,
    looks: Vec<Look>,
    there: Option<(Stalls, Stalls)>,
    state: Option<State>,
}

struct Shared {
    began: Instant,
    memory_bytes: u64,
    interval: Duration,
    over: AtomicBool,
    inner: Mutex<Inner>,
}

/// A thread that looks until this is dropped.
pub(crate) struct Watch {
    shared: Arc<Shared>,
    thread: Option<JoinHandle<()>>,
}

/// All processes together, at one moment.
#[derive(Clone, Debug, Default)]
pub(crate) struct Usage {
    /// CPU time of all threads but vCPUs.
    pub(crate) cpu: Duration,
    /// Most resident memory so far, by process.
    pub(crate) peak_bytes: Vec<(u32, u64)>,
}

fn lock(shared: &Shared) -> MutexGuard<'_, Inner> {
    shared.inner.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Watch {
    /// Begins to look at a guest with so much memory.
    pub(crate) fn new(memory_bytes: u64, processes: &[Process], interval: Duration) -> Self {
        let inner = Mutex::new(Inner::default());
        let over = AtomicBool::new(false);
        let shared =
            Arc::new(Shared { began: Instant::now(), memory_bytes, interval, over, inner });
        let mine = shared.clone();
        let watch = Self { shared, thread: Some(std::thread::spawn(move || look(&mine))) };
        processes.iter().for_each(|p| watch.add(*p));
        watch
    }

    /// Looks at one more process.
    pub(crate) fn add(&self, process: Process) {
        lock(&self.shared).processes.push((process, Used::default()));
    }

    /// Time since it began.
    pub(crate) fn now(&self) -> Duration {
        self.shared.began.elapsed()
    }

    /// The looks so far.
    pub(crate) fn looks(&self) -> Vec<Look> {
        lock(&self.shared).looks.clone()
    }

    /// What the guest said last that it does.
    pub(crate) fn state(&self) -> Option<State> {
        lock(&self.shared).state
    }

    /// Waits until `ready`.
    pub(crate) fn wait(
        &self,
        what: &str,
        most: Duration,
        mut ready: impl FnMut(&Self) -> bool,
    ) -> Result<(), Failure> {
        let began = Instant::now();
        while !ready(self) {
            if began.elapsed() > most {
                return Err(format!("{what}: not within {} s", most.as_secs()).into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// Whether the guest was seen to run at the destination.
    pub(crate) fn runs_there(&self) -> bool {
        lock(&self.shared).there.is_some()
    }

    /// Visits that took long at the destination, but for the one at the hand-over.
    pub(crate) fn stalls_there(&self) -> Option<Stalls> {
        lock(&self.shared).there.map(|(first, last)| last.since(&first))
    }

    /// What was used so far. Of a process that ended, what was seen last.
    pub(crate) fn usage(&self) -> Usage {
        count(&self.shared);
        let mut usage = Usage::default();
        for (process, used) in &lock(&self.shared).processes {
            usage.cpu += used.cpu.saturating_sub(used.vcpus);
            usage.peak_bytes.push((process.pid, used.resident_bytes));
        }
        usage
    }

    /// Forgets how much memory was resident: peaks are of what comes.
    pub(crate) fn forget_peaks(&self) {
        lock(&self.shared).processes.iter_mut().for_each(|(_, used)| used.resident_bytes = 0);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.over.store(true, Relaxed);
        if let Some(thread) = self.thread.take() {
            // It does not panic, and has nothing to say.
            let _ = thread.join();
        }
    }
}

/// In an entry of `pagemap`: the page is there.
const PRESENT: u64 = 1 << 63;

/// One process's guest memory, found or sought.
struct Window {
    pid: u32,
    end: End,
    memory: Option<File>,
    /// What the kernel says of each page, eight bytes each.
    pagemap: Option<File>,
    candidates: Vec<u64>,
    found: bool,
}

impl Window {
    fn seek(&mut self, bytes: u64) {
        if !self.found {
            let maps = fs::read_to_string(format!("/proc/{}/maps", self.pid)).unwrap_or_default();
            self.candidates = guest_memory(&maps, bytes);
            self.memory = File::open(format!("/proc/{}/mem", self.pid)).ok();
            self.pagemap = File::open(format!("/proc/{}/pagemap", self.pid)).ok();
        }
    }

    /// The status page; none as long as it is not there, or will not be any more.
    fn read<'a>(&mut self, page: &'a mut [u8]) -> Option<StatusView<'a>> {
        let (memory, pagemap) = (self.memory.as_ref()?, self.pagemap.as_ref()?);
        let at = self.candidates.iter().copied().find(|base| {
            let at = base + status::GPA;
            let mut entry = [0; 8];
            pagemap.read_exact_at(&mut entry, at / 4096 * 8).is_ok()
                && u64::from_le_bytes(entry) & PRESENT != 0
                && memory.read_exact_at(page, at).is_ok()
                && StatusView::parse(page).is_ok()
        })?;
        if !self.found {
            (self.found, self.candidates) = (true, vec![at]);
        }
        StatusView::parse(page).ok()
    }
}

fn look(shared: &Shared) {
    let priority = libc::sched_param { sched_priority: 10 };
    // SAFETY: it reads `priority` and no other memory. Where it is not permitted, looks may come late.
    unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const priority) };
    let mut windows: Vec<Window> = Vec::new();
    let mut page = vec![0; status::BYTES];
    let mut at_source: Option<Look> = None;
    let mut next_count = Duration::ZERO;
    while !shared.over.load(Relaxed) {
        let began = shared.began.elapsed();
        if began >= next_count {
            next_count = began + COUNT;
            count(shared);
            for (process, _) in &lock(shared).processes {
                if let (Some(end), false) =
                    (process.end, windows.iter().any(|w| w.pid == process.pid))
                {
                    windows.push(Window {
                        pid: process.pid,
                        end,
                        memory: None,
                        pagemap: None,
                        candidates: Vec::new(),
                        found: false,
                    });
                }
            }
            // What runs at the source is asked first.
            windows.sort_by_key(|w| w.end == End::Destination);
            windows.iter_mut().for_each(|w| w.seek(shared.memory_bytes));
        }
        for window in &mut windows {
            let Some(view) = window.read(&mut page) else { continue };
            let done = view.counters(0);
            let visits = done.written.wrapping_add(done.checked);
            let look =
                Look { at: shared.began.elapsed(), end: window.end, visits, clock: done.tsc };
            let mut inner = lock(shared);
            match (window.end, at_source) {
                (End::Source, _) => {
                    at_source = Some(look);
                    inner.state = view.state();
                }
                (End::Destination, Some(source)) if look.clock > source.clock => {
                    inner.state = view.state();
                    let stalls = view.stalls();
                    inner.there.get_or_insert((stalls, stalls)).1 = stalls;
                }
                (End::Destination, _) => {}
            }
            inner.looks.push(look);
        }
        std::thread::sleep(
            shared.interval.saturating_sub(shared.began.elapsed().saturating_sub(began)),
        );
    }
}

fn count(shared: &Shared) {
    let pids: Vec<u32> = lock(shared).processes.iter().map(|(p, _)| p.pid).collect();
    for pid in pids {
        let (cpu, vcpus, resident) = (cpu_time(pid), vcpu_time(pid), resident_bytes(pid));
        for (_, used) in lock(shared).processes.iter_mut().filter(|(p, _)| p.pid == pid) {
            used.cpu = used.cpu.max(cpu.unwrap_or_default());
            used.vcpus = used.vcpus.max(vcpus);
            used.resident_bytes = used.resident_bytes.max(resident.unwrap_or_default());
        }
    }
}

/// CPU time of all threads of a process, those that ended included.
fn cpu_time(pid: u32) -> Option<Duration> {
    const CPUCLOCK_SCHED: i32 = 2;
    let clock = !i32::try_from(pid).ok()? << 3 | CPUCLOCK_SCHED;
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: it writes `time` and no other memory.
    let got = unsafe { libc::clock_gettime(clock, &raw mut time) };
    let (s, ns) = (u64::try_from(time.tv_sec).ok()?, u32::try_from(time.tv_nsec).ok()?);
    (got == 0).then(|| Duration::new(s, ns))
}

/// CPU time of the vCPU threads that live.
fn vcpu_time(pid: u32) -> Duration {
    let Ok(tasks) = fs::read_dir(format!("/proc/{pid}/task")) else { return Duration::ZERO };
    let ran = tasks.flatten().filter_map(|task| {
        let name = fs::read_to_string(task.path().join("comm")).ok()?;
        let is_vcpu = name.contains("-vcpu") || (name.starts_with("CPU ") && name.contains("/KVM"));
        let said = fs::read_to_string(task.path().join("schedstat")).ok().filter(|_| is_vcpu)?;
        said.split(' ').next()?.parse().ok().map(Duration::from_nanos)
    });
    ran.sum()
}

fn resident_bytes(pid: u32) -> Option<u64> {
    let said = fs::read_to_string(format!("/proc/{pid}/statm")).ok()?;
    said.split(' ').nth(1)?.parse::<u64>().ok().map(|pages| pages * 4096)
}

/// Resident bytes of the guest's memory in a process.
pub(crate) fn guest_resident_bytes(pid: u32, memory_bytes: u64) -> Option<u64> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps")).ok()?;
    let guest = stretches(&smaps, memory_bytes);
    let (mut sum, mut counts) = (0, false);
    for line in smaps.lines() {
        if let Some(((from, _), _)) = any_mapping(line) {
            counts = guest.iter().any(|(begin, end)| (*begin..*end).contains(&from));
        } else if let (true, Some(kb)) = (counts, line.strip_prefix("Rss:")) {
            sum += kb.trim().trim_end_matches(" kB").parse::<u64>().ok()? * 1024;
        }
    }
    Some(sum)
}

/// Addresses of a line of `maps`, and whether its memory is read and written.
fn any_mapping(line: &str) -> Option<((u64, u64), bool)> {
    let mut words = line.split(' ');
    let (from, to) = words.next()?.split_once('-')?;
    let hex = |s| u64::from_str_radix(s, 16).ok();
    Some(((hex(from)?, hex(to)?), words.next()?.starts_with("rw")))
}

/// Memory that is read and written, in stretches that may be a guest's: it may have several, below and above
/// 4 GiB, and each may be of several mappings side by side.
fn stretches(maps: &str, bytes: u64) -> Vec<(u64, u64)> {
    let mut stretches: Vec<(u64, u64)> = Vec::new();
    for ((from, to), _) in maps.lines().filter_map(any_mapping).filter(|(_, rw)| *rw) {
        match stretches.last_mut() {
            Some(last) if last.1 == from => last.1 = to,
            _ => stretches.push((from, to)),
        }
    }
    stretches.retain(|(from, to)| to - from >= bytes / 4);
    stretches
}

/// Where the guest's memory may begin in a process.
fn guest_memory(maps: &str, bytes: u64) -> Vec<u64> {
    let guest = stretches(maps, bytes);
    let inside = |at: u64| guest.iter().any(|(from, to)| (*from..*to).contains(&at));
    let all = maps.lines().filter_map(any_mapping).map(|((from, _), _)| from);
    all.filter(|from| inside(*from)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAPS: &str = "\
5500-5600 rw-p 00000000 00:00 0 [heap]
10000-20000 r--p 00000000 00:00 0
20000-28000 rw-p 00000000 00:00 0
28000-30000 rw-p 00000000 00:00 0
40000-60000 rw-p 00000000 00:00 0
";

    #[test]
    fn a_guests_memory_may_be_in_parts_and_beside_other_memory() {
        assert_eq!(guest_memory(MAPS, 0x20000), [0x20000, 0x28000, 0x40000]);
        assert_eq!(guest_memory(MAPS, 0x80000), [0x40000]);
        assert_eq!(guest_memory(MAPS, 0x81000), [0; 0]);
        assert_eq!(guest_memory("junk\n\n1-\n", 1), [0; 0]);
    }

    #[test]
    fn this_process_uses_cpu_and_memory() {
        let pid = std::process::id();
        assert!(cpu_time(pid).unwrap() > Duration::ZERO);
        assert!(resident_bytes(pid).unwrap() > 0);
        assert_eq!(vcpu_time(pid), Duration::ZERO);
        assert_eq!(cpu_time(u32::MAX), None);
    }
}

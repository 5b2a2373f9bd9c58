//! A machine of either kind, as the hosting process sees it.

use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use ferry_dirtylog::DirtySource;
use ferry_guest::status::{self, StatusView};
use ferry_migrate::{
    FreePages, Guest, GuestError, GuestView, MachineSpec, PageSet, RunPermit, StateReader,
    StateWriter,
};
use ferry_process_guest::{ProcessGuest, Tracker};
use ferry_refvmm::{Cpu, Machine, MachineStatus};

/// Clones are handles to the same machine.
#[derive(Clone, Debug)]
pub(crate) enum AnyMachine {
    Kvm(Machine),
    Process(Arc<Mutex<ProcessGuest>>),
}

impl AnyMachine {
    pub(crate) fn process(guest: ProcessGuest) -> Self {
        Self::Process(Arc::new(Mutex::new(guest)))
    }

    pub(crate) fn kind(&self) -> &'static str {
        match self {
            Self::Kvm(_) => "kvm",
            Self::Process(_) => "process",
        }
    }

    /// What it is doing, in words.
    pub(crate) fn state(&self) -> String {
        match self {
            Self::Kvm(m) => m.status().to_string(),
            Self::Process(p) => {
                let p = lock(p);
                match (p.corrupt(), p.status()) {
                    (Some(c), _) => format!("crashed: wrong page: {c:?}"),
                    (None, s) if s.runs => "running".into(),
                    (None, s) if s.holds_permit => "paused".into(),
                    (None, _) => "handing over".into(),
                }
            }
        }
    }

    /// What it was shown of the processor.
    pub(crate) fn cpu(&self) -> Result<Cpu, String> {
        match self {
            Self::Kvm(m) => Ok(m.cpu()),
            Self::Process(_) => Err("a process guest is shown no processor: it runs on any".into()),
        }
    }

    /// How its writes are tracked.
    pub(crate) fn dirty_log(&self) -> String {
        match self {
            Self::Kvm(m) => m.dirty_log().into(),
            Self::Process(p) => match lock(p).config().tracker {
                Tracker::UffdWriteProtect => "write-protect".into(),
                Tracker::Software => "software".into(),
            },
        }
    }

    /// Starts one that was made here, and has not run.
    pub(crate) fn begin(&self) -> Result<(), String> {
        match self {
            Self::Kvm(m) => m.resume_by_operator().map_err(|e| e.to_string()),
            Self::Process(p) => lock(p).run().map_err(|e| e.to_string()),
        }
    }

    pub(crate) fn pause_by_operator(&self) -> Result<(), String> {
        match self {
            Self::Kvm(m) => m.pause_by_operator().map_err(|e| e.to_string()),
            Self::Process(p) => lock(p).pause_by_operator().map_err(|e| e.to_string()),
        }
    }

    pub(crate) fn resume_by_operator(&self) -> Result<(), String> {
        match self {
            Self::Kvm(m) => m.resume_by_operator().map_err(|e| e.to_string()),
            Self::Process(p) => lock(p).resume_by_operator().map_err(|e| e.to_string()),
        }
    }

    pub(crate) fn stop(&self) {
        match self {
            Self::Kvm(m) => m.stop(),
            Self::Process(p) => lock(p).stop(),
        }
    }

    /// Waits until the guest ended by itself, and says how.
    pub(crate) fn wait_ended(&self, timeout: Duration) -> Option<String> {
        match self {
            Self::Kvm(m) => match m.wait_ended(timeout)? {
                MachineStatus::Stopped => None,
                how => Some(how.to_string()),
            },
            Self::Process(p) => {
                std::thread::sleep(timeout);
                lock(p).corrupt().map(|c| format!("crashed: wrong page: {c:?}"))
            }
        }
    }

    /// Of a test guest, pages written and checked; `lacks` says of a page that it is not here, and is not
    /// to be waited for.
    pub(crate) fn counters(&self, lacks: impl FnOnce(u64) -> bool) -> Option<(u64, u64)> {
        match self {
            Self::Process(p) => {
                let counters = lock(p).counters();
                Some(counters.iter().fold((0, 0), |(w, c), one| (w + one.written, c + one.checked)))
            }
            Self::Kvm(m) => {
                let (gfn, mut page) = (status::GPA / PAGE_BYTES, vec![0; status::BYTES]);
                if lacks(gfn) {
                    return None;
                }
                m.memory().read(gfn, &mut page).ok()?;
                let total = StatusView::parse(&page).ok()?.total();
                Some((total.written, total.checked))
            }
        }
    }

    /// Has the guest use no more than `bytes` of its memory.
    pub(crate) fn set_balloon_target(&self, bytes: u64) -> Result<(), String> {
        match self {
            Self::Kvm(m) => m.set_balloon_target(bytes).map_err(|e| e.to_string()),
            Self::Process(p) => lock(p).set_balloon_target(bytes).map_err(|e| e.to_string()),
        }
    }

    /// How its balloon stands.
    pub(crate) fn balloon(&self) -> ferry_balloon::Status {
        match self {
            Self::Kvm(m) => m.balloon(),
            Self::Process(p) => {
                let p = lock(p);
                let (memory_bytes, ballooned_bytes) = (p.config().memory_bytes, p.balloon_bytes());
                let last_trouble = p.balloon_trouble();
                ferry_balloon::Status {
                    driver: true,
                    memory_bytes,
                    target_bytes: p.balloon_target(),
                    actual_bytes: memory_bytes - ballooned_bytes,
                    ballooned_bytes,
                    troubles: last_trouble.is_some().into(),
                    last_trouble,
                    ..ferry_balloon::Status::default()
                }
            }
        }
    }

    /// Asks the guest how it uses its memory; the answer comes into [`balloon`](Self::balloon). Whether there
    /// is somebody to ask.
    pub(crate) fn ask_balloon_statistics(&self) -> bool {
        match self {
            Self::Kvm(m) => m.ask_balloon_statistics(),
            Self::Process(_) => return false,
        }
        true
    }

    fn with<R>(&mut self, act: impl FnOnce(&mut dyn Guest) -> R) -> R {
        match self {
            Self::Kvm(m) => act(m),
            Self::Process(p) => act(&mut *lock(p)),
        }
    }
}

/// Bytes in a page of guest memory.
pub(crate) const PAGE_BYTES: u64 = 4096;

fn lock(guest: &Mutex<ProcessGuest>) -> MutexGuard<'_, ProcessGuest> {
    guest.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Guest for AnyMachine {
    fn spec(&self) -> MachineSpec {
        self.clone().with(|g| g.spec())
    }
    fn machine(&self) -> Option<u128> {
        self.clone().with(|g| g.machine())
    }
    fn memory(&self) -> GuestView {
        self.clone().with(|g| g.memory())
    }
    fn dirty_sources(&mut self) -> Result<Vec<Box<dyn DirtySource>>, GuestError> {
        self.with(|g| g.dirty_sources())
    }
    fn free_pages(&mut self) -> Option<Box<dyn FreePages>> {
        self.with(|g| g.free_pages())
    }
    fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        self.with(|g| g.throttle(percent))
    }
    fn return_dirty(&mut self, pages: &PageSet) {
        self.with(|g| g.return_dirty(pages));
    }
    fn pause(&mut self) -> Result<RunPermit, GuestError> {
        self.with(|g| g.pause())
    }
    fn resume(&mut self, permit: RunPermit) -> Result<(), (RunPermit, GuestError)> {
        self.with(|g| g.resume(permit))
    }
    fn save(&mut self, out: &mut StateWriter) -> Result<(), GuestError> {
        self.with(|g| g.save(out))
    }
    fn load(&mut self, state: &StateReader) -> Result<(), GuestError> {
        self.with(|g| g.load(state))
    }
}

/// Whether this host has KVM, and why not.
pub(crate) fn kvm() -> Result<(), String> {
    std::fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(Path::new("/dev/kvm"))
        .map(drop)
        .map_err(|e| format!("/dev/kvm cannot be opened: {e}"))
}

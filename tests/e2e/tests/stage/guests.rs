//! The guests that are moved, behind one trait.

use std::io::Write;
use std::time::Duration;

use ferry_guest::status::{self, State, StatusView};
use ferry_migrate::{Guest, Host};
use ferry_process_guest::{Config, ProcessGuest, ProcessHost, Tracker};
use ferry_refvmm::{Arrival, DirtyLog, Machine, MachineConfig, MachineStatus, RefHost, SerialSink};

use super::eventually;

/// A guest that checks its own memory.
pub trait Subject: Guest + Sized + 'static {
    /// Pages written so far.
    fn written(&self) -> u64;
    /// What the guest found wrong with its memory.
    fn wrong(&self) -> Option<String>;
    /// Whether its vCPUs run.
    fn runs(&self) -> bool;
    /// Whether it has written all its pages once and follows its pattern.
    fn is_busy(&self) -> bool;
}

impl Subject for ProcessGuest {
    fn written(&self) -> u64 {
        self.counters().iter().map(|c| c.written).sum()
    }
    fn wrong(&self) -> Option<String> {
        self.corrupt().map(|c| format!("{c:?}"))
    }
    fn runs(&self) -> bool {
        self.status().runs
    }
    fn is_busy(&self) -> bool {
        self.status().workload != State::Filling && self.written() > 0
    }
}

fn status_of<T>(machine: &Machine, f: impl FnOnce(StatusView<'_>) -> T) -> Option<T> {
    let mut page = vec![0; status::BYTES];
    machine.memory().read(status::GPA >> 12, &mut page).unwrap();
    StatusView::parse(&page).ok().map(f)
}

impl Subject for Machine {
    fn written(&self) -> u64 {
        status_of(self, |s| s.total().written).unwrap_or(0)
    }
    fn wrong(&self) -> Option<String> {
        let found = status_of(self, |s| match (s.error(), s.state()) {
            (Some(e), _) => Some(format!("{e:?}")),
            (_, Some(State::BadParams | State::Fault)) => Some(s.message().to_owned()),
            _ => None,
        });
        let ended = match self.status() {
            MachineStatus::Halted { reason } | MachineStatus::Crashed { reason } => Some(reason),
            _ => None,
        };
        found.flatten().or(ended)
    }
    fn runs(&self) -> bool {
        self.status() == MachineStatus::Running
    }
    fn is_busy(&self) -> bool {
        status_of(self, |s| s.state() == Some(State::Running)).unwrap_or(false)
            && self.written() > 0
    }
}

/// Makes guests of one kind, and hosts for them.
pub trait Maker {
    type Subject: Subject;
    type Host: Host<Guest = Self::Subject> + 'static;
    fn new_guest(&self) -> Self::Subject;
    fn host(&self) -> Self::Host;

    /// A guest that runs and has filled its arena.
    fn busy_guest(&self) -> Self::Subject {
        let guest = self.new_guest();
        eventually("the guest has filled its memory", || {
            guest.is_busy() || guest.wrong().is_some()
        });
        assert_eq!(guest.wrong(), None);
        guest
    }
}

/// A process guest with two workers.
#[derive(Clone, Debug)]
pub struct Process {
    pub tracker: Tracker,
    pub memory_bytes: u64,
    pub workload: String,
}

impl Maker for Process {
    type Subject = ProcessGuest;
    type Host = ProcessHost;

    fn new_guest(&self) -> ProcessGuest {
        self.with(false)
    }

    fn host(&self) -> ProcessHost {
        ProcessHost::default()
    }
}

impl Process {
    fn with(&self, huge_pages: bool) -> ProcessGuest {
        let mut guest = ProcessGuest::new(Config {
            name: "p1".into(),
            memory_bytes: self.memory_bytes,
            huge_pages,
            workers: 2,
            workload: self.workload.clone(),
            tracker: self.tracker,
        })
        .unwrap();
        guest.run().unwrap();
        guest
    }
}

/// A KVM machine with two vCPUs that runs the bare-metal guest.
#[derive(Clone, Debug)]
pub struct Kvm {
    pub dirty_log: DirtyLog,
    pub memory_bytes: u64,
    pub workload: String,
}

impl Maker for Kvm {
    type Subject = Machine;
    type Host = RefHost;

    fn new_guest(&self) -> Machine {
        self.with(false)
    }

    fn host(&self) -> RefHost {
        RefHost { arrival: Arrival { dirty_log: self.dirty_log, ..Arrival::default() } }
    }
}

impl Kvm {
    fn with(&self, huge_pages: bool) -> Machine {
        let mut image = tempfile::NamedTempFile::new().unwrap();
        image.write_all(ferry_guest::ELF).unwrap();
        let tsc_khz = RefHost::tsc_khz().unwrap();
        let machine = Machine::boot(&MachineConfig {
            name: "k1".into(),
            memory_bytes: self.memory_bytes,
            huge_pages,
            cpus: 2,
            cpu: None,
            kernel: image.path().to_owned(),
            initrd: None,
            cmdline: format!("cpus=2 tsc_khz={tsc_khz} {}", self.workload),
            dirty_log: self.dirty_log,
            serial: SerialSink::Discard,
        })
        .unwrap();
        machine.resume_by_operator().unwrap();
        machine
    }
}

/// The same guests, in huge pages.
#[derive(Clone, Debug)]
pub struct Huge<M>(pub M);

impl Maker for Huge<Process> {
    type Subject = ProcessGuest;
    type Host = ProcessHost;

    fn new_guest(&self) -> ProcessGuest {
        self.0.with(true)
    }

    fn host(&self) -> ProcessHost {
        ProcessHost { huge_pages: true, ..self.0.host() }
    }
}

impl Maker for Huge<Kvm> {
    type Subject = Machine;
    type Host = RefHost;

    fn new_guest(&self) -> Machine {
        self.0.with(true)
    }

    fn host(&self) -> RefHost {
        let arrival = self.0.host().arrival;
        RefHost { arrival: Arrival { huge_pages: true, ..arrival } }
    }
}

/// Each way to find dirty pages, with a guest that needs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Kvm(DirtyLog),
    Process(Tracker),
}

impl Kind {
    pub const ALL: [Self; 5] = [
        Self::Kvm(DirtyLog::Bitmap),
        Self::Kvm(DirtyLog::Ring),
        Self::Kvm(DirtyLog::WriteProtect),
        Self::Process(Tracker::UffdWriteProtect),
        Self::Process(Tracker::Software),
    ];
}

/// Whether KVM machines can be made here; says so if not.
pub fn has_kvm() -> bool {
    let opened = std::fs::OpenOptions::new().read(true).write(true).open("/dev/kvm");
    if let Err(e) = &opened {
        println!("SKIP: no KVM machines in this run: /dev/kvm cannot be opened: {e}");
    }
    opened.is_ok()
}

/// Long enough for a guest to do something.
pub const MOMENT: Duration = Duration::from_millis(20);

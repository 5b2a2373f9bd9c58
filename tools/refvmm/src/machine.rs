//! A machine as its operator and the migration engine hold it.

use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use ferry_pages::PageSet;
use ferry_protocol::RunPermit;
use kvm_bindings::kvm_cpuid_entry2;
use serde::{Deserialize, Serialize};

use crate::arch::cpuid;
use crate::board::{self, Board, Plan};
use crate::config::Shape;
use crate::host::Here;
use crate::vcpu::Ended;
use crate::{Cpu, MachineConfig, VmmError, boot};

/// A virtual machine. Clones are handles to the same one; the last one that goes stops it.
///
/// It runs on its [`RunPermit`]. While the permit is out (a migration took it by
/// [`Guest::pause`](ferry_migrate::Guest::pause)) the operator's calls are refused.
#[derive(Clone)]
pub struct Machine(pub(crate) Arc<Inner>);

pub(crate) struct Inner {
    pub(crate) name: String,
    pub(crate) shape: Shape,
    control: Mutex<Control>,
    pub(crate) board: Board,
}

/// Who may let it run, and whether it does.
pub(crate) struct Control {
    /// Here, unless the machine has not arrived, is being handed over, or was moved away.
    pub(crate) permit: Option<RunPermit>,
    /// The machine's lasting number, once it is known.
    pub(crate) id: Option<u128>,
    /// The operator wants it paused.
    pub(crate) operator_paused: bool,
    /// vCPUs were told to run.
    pub(crate) running: bool,
    /// There is state to run from.
    pub(crate) loaded: bool,
    moved: bool,
    stopped: bool,
    threads: Vec<JoinHandle<()>>,
}

/// What a machine is doing.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "kebab-case")]
pub enum MachineStatus {
    /// vCPUs execute.
    Running,
    /// The operator paused it, or it was never started.
    Paused,
    /// Prepared for a machine that has not arrived.
    Arriving,
    /// Stopped for a migration that holds its permit.
    HandingOver,
    /// It runs elsewhere.
    Moved,
    /// The guest reset the machine.
    Halted {
        /// How.
        reason: String,
    },
    /// The guest cannot go on.
    Crashed {
        /// Why.
        reason: String,
    },
    /// Its vCPU threads have ended.
    Stopped,
}

impl fmt::Display for MachineStatus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Running => f.write_str("running"),
            Self::Paused => f.write_str("paused"),
            Self::Arriving => f.write_str("arriving"),
            Self::HandingOver => f.write_str("handing over"),
            Self::Moved => f.write_str("moved"),
            Self::Halted { reason } => write!(f, "halted: {reason}"),
            Self::Crashed { reason } => write!(f, "crashed: {reason}"),
            Self::Stopped => f.write_str("stopped"),
        }
    }
}

impl From<Ended> for MachineStatus {
    fn from(how: Ended) -> Self {
        match how {
            Ended::Reset(reason) => Self::Halted { reason },
            Ended::Crashed(reason) => Self::Crashed { reason },
        }
    }
}

impl Machine {
    /// Builds a machine and loads its kernel: paused, in front of its first instruction.
    ///
    /// # Errors
    /// No KVM, sizes that cannot be, a kernel or initrd that cannot be used, a sink or dirty log that
    /// cannot be set up.
    pub fn boot(config: &MachineConfig) -> Result<Self, VmmError> {
        let kvm = board::open_kvm()?;
        let shape = Shape::new(config.memory_bytes, config.cpus, board::max_cpus(&kvm))?;
        let here = Here::of(&kvm)?;
        let mut base = cpuid::of_new_machine(&here.shows);
        if let Some(cpu) = &config.cpu {
            let cpu = cpu.clone().without_orphans();
            let lacks = here.cpu().lacks(&cpu);
            if !lacks.is_empty() {
                return Err(VmmError::Cpu(lacks));
            }
            base = cpu.only(&base);
        }
        let plan = Plan {
            name: &config.name,
            shape,
            huge_pages: config.huge_pages,
            dirty_log: config.dirty_log,
            serial: &config.serial,
            hidden: here.hidden_in(&base),
            cpuid: (0..shape.cpus).map(|i| cpuid::of_vcpu(&base, i, shape.cpus)).collect(),
            tsc_khz: config.cpu.as_ref().map(|cpu| cpu.tsc_khz),
        };
        let id = board::random_id()?;
        let parts = Board::build(&kvm, plan, |ram| boot::prepare(ram, config).map(Some))?;
        Ok(Self::new(&config.name, shape, parts, Some(id)))
    }

    /// `id`: of a machine that begins here.
    pub(crate) fn new(
        name: &str,
        shape: Shape,
        parts: (Board, Vec<JoinHandle<()>>),
        id: Option<u128>,
    ) -> Self {
        let (board, threads) = parts;
        let control = Mutex::new(Control {
            permit: id.map(RunPermit::for_new_machine),
            id,
            operator_paused: id.is_some(),
            running: false,
            loaded: id.is_some(),
            moved: false,
            stopped: false,
            threads,
        });
        Self(Arc::new(Inner { name: name.to_owned(), shape, control, board }))
    }

    /// The machine's name here.
    pub fn name(&self) -> &str {
        &self.0.name
    }

    /// Bytes of guest memory.
    pub fn memory_bytes(&self) -> u64 {
        self.0.shape.memory_bytes
    }

    /// Number of vCPUs.
    pub fn cpus(&self) -> u32 {
        self.0.shape.cpus
    }

    /// What it was shown of the processor.
    pub fn cpu(&self) -> Cpu {
        let first = self.0.cpuid().first().map_or(&[][..], Vec::as_slice);
        Cpu::of(first, self.0.board.tsc_khz, false)
    }

    /// How writes are tracked: `bitmap`, `ring` or `write-protect`.
    pub fn dirty_log(&self) -> &'static str {
        self.0.board.tracking.name()
    }

    /// What it is doing.
    pub fn status(&self) -> MachineStatus {
        let control = self.0.control();
        if control.moved {
            MachineStatus::Moved
        } else if let Some(how) = self.0.board.vcpus.ended() {
            how.into()
        } else if control.stopped {
            MachineStatus::Stopped
        } else if control.running {
            MachineStatus::Running
        } else if control.permit.is_some() {
            MachineStatus::Paused
        } else if control.id.is_none() {
            MachineStatus::Arriving
        } else {
            MachineStatus::HandingOver
        }
    }

    /// The operator pauses it; nothing if it is paused.
    ///
    /// # Errors
    /// It is being handed over, has ended, or a vCPU does not stop.
    pub fn pause_by_operator(&self) -> Result<(), VmmError> {
        let mut control = self.0.control();
        self.0.check_here(&control)?;
        self.0.park(&mut control)?;
        control.operator_paused = true;
        Ok(())
    }

    /// The operator lets it run; nothing if it runs.
    ///
    /// # Errors
    /// It is being handed over, or has ended.
    pub fn resume_by_operator(&self) -> Result<(), VmmError> {
        let mut control = self.0.control();
        self.0.check_here(&control)?;
        control.operator_paused = false;
        self.0.run(&mut control);
        Ok(())
    }

    /// Ends its vCPU threads for good. Memory stays until the last handle goes.
    pub fn stop(&self) {
        self.0.stop();
    }

    /// Notes that the machine runs elsewhere now: called once its permit was sent away. Nothing while
    /// the permit is here.
    pub fn set_moved(&self) {
        let mut control = self.0.control();
        control.moved = control.permit.is_none() && control.id.is_some();
    }

    /// Waits until the guest halted or crashed, or the machine was stopped; `None` after `timeout`.
    pub fn wait_ended(&self, timeout: Duration) -> Option<MachineStatus> {
        let how = self.0.board.vcpus.wait_ended(timeout);
        how.map(Into::into).or_else(|| self.0.control().stopped.then_some(MachineStatus::Stopped))
    }

    /// Types `bytes` at the serial console; returns how many the 64-byte FIFO took.
    pub fn console_input(&self, bytes: &[u8]) -> usize {
        self.0.board.console.input(bytes)
    }

    /// Has the guest use no more than `bytes` of its memory, by its balloon: it gives the rest back as it can.
    ///
    /// # Errors
    /// The machine is not here, no driver runs in the guest, or it has less memory.
    pub fn set_balloon_target(&self, bytes: u64) -> Result<(), VmmError> {
        let control = self.0.control();
        self.0.check_here(&control)?;
        self.0.board.balloon.set_target(bytes).map_err(|e| self.0.condition(e.to_string()))
    }

    /// How its balloon stands.
    pub fn balloon(&self) -> ferry_balloon::Status {
        self.0.board.balloon.status()
    }

    /// Asks the guest for its statistics: they are in [`balloon`](Self::balloon) when it has answered. Nothing
    /// while it stands still.
    pub fn ask_balloon_statistics(&self) {
        // The lock: memory is written, which must not happen once it is paused.
        let control = self.0.control();
        if control.running {
            self.0.board.balloon.ask_statistics();
        }
    }

    /// Asks the guest which pages are free.
    ///
    /// # Errors
    /// The machine is not here, or the guest does not say.
    pub fn begin_free_page_hints(&self) -> Result<(), VmmError> {
        let control = self.0.control();
        self.0.check_here(&control)?;
        self.0.board.balloon.hint_begin().map_err(|e| self.0.condition(e.to_string()))
    }

    /// Adds to `into` the pages that were hinted since this was last called; whether no more will come. A hint
    /// is a claim: see [`Balloon::take_hints`](ferry_balloon::Balloon::take_hints).
    pub fn take_free_page_hints(&self, into: &mut PageSet) -> bool {
        self.0.board.balloon.take_hints(into)
    }

    /// Lets the guest use hinted pages again.
    pub fn end_free_page_hints(&self) {
        self.0.board.balloon.hint_end();
    }
}

impl fmt::Debug for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Machine({}, {} vCPUs, {} bytes)",
            self.0.name, self.0.shape.cpus, self.0.shape.memory_bytes
        )
    }
}

impl Inner {
    pub(crate) fn control(&self) -> MutexGuard<'_, Control> {
        self.control.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn condition(&self, why: impl Into<String>) -> VmmError {
        VmmError::Condition { name: self.name.clone(), why: why.into() }
    }

    /// Refuses unless the machine is here and alive.
    pub(crate) fn check_here(&self, control: &Control) -> Result<(), VmmError> {
        self.check_alive(control)?;
        if control.moved {
            return Err(self.condition("it was moved to another host and runs there"));
        }
        match (&control.permit, control.id) {
            (Some(_), _) => Ok(()),
            (None, Some(_)) => Err(self.condition("it is being handed over to another host")),
            (None, None) => Err(self.condition("it has not arrived yet")),
        }
    }

    /// Refuses if the guest ended or the machine was stopped.
    pub(crate) fn check_alive(&self, control: &Control) -> Result<(), VmmError> {
        if control.stopped {
            return Err(self.condition("it was stopped"));
        }
        match self.board.vcpus.ended() {
            Some(how) => Err(self.condition(format!("it has {}", MachineStatus::from(how)))),
            None => Ok(()),
        }
    }

    /// Stops the vCPUs; they run on if one does not stop.
    pub(crate) fn park(&self, control: &mut Control) -> Result<(), VmmError> {
        let stopped = self.board.vcpus.park(&self.name);
        if stopped.is_err() && control.running {
            self.board.vcpus.run();
        } else {
            control.running = false;
        }
        stopped
    }

    /// Lets the vCPUs run.
    pub(crate) fn run(&self, control: &mut Control) {
        if !control.running {
            for index in 0..self.board.vcpus.count() {
                // Tells a guest that uses kvmclock that it stood still, so that its watchdogs forgive;
                // refused by KVM for one that does not use it.
                let _ = self.board.vcpus.with(index, |fd| fd.kvmclock_ctrl());
            }
            self.board.vcpus.run();
            control.running = true;
        }
    }

    fn stop(&self) {
        let mut control = self.control();
        if !control.stopped {
            control.stopped = true;
            control.running = false;
            self.board.vcpus.exit();
            for thread in control.threads.drain(..) {
                drop(thread.join());
            }
        }
    }

    /// What each vCPU was shown.
    pub(crate) fn cpuid(&self) -> &[Vec<kvm_cpuid_entry2>] {
        &self.board.cpuid
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.stop();
    }
}

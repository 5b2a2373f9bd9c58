//! The guest, as a migration sees it.

use std::io::Read;
use std::sync::Arc;

use ferry_dirtylog::{DirtySource, SoftwareBitmap, UffdWriteProtect};
use ferry_guest::status::{Counters, State};
use ferry_guest::workload::{Params, Worker};
use ferry_memory::GuestView;
use ferry_migrate::{
    DeviceSpec, Guest, GuestError, MachineSpec, RunPermit, StateError, StateReader, StateWriter,
};
use ferry_pages::Run;

use crate::memory::{Memory, PAGE, Plan};
use crate::state::{BalloonState, MachineState, WorkerState};
use crate::workers::Workers;
use crate::{
    BALLOON, Config, Corruption, MACHINE, ProcessError, STATE_VERSION, Tracker, VMM, WORKER,
};

/// A machine of plain memory and threads.
///
/// It begins parked; [`ProcessGuest::run`] gives a new one its permit.
#[derive(Debug)]
pub struct ProcessGuest {
    config: Config,
    params: Params,
    marks: Option<Arc<SoftwareBitmap>>,
    workers: Workers,
    permit: Option<RunPermit>,
    paused_by_operator: bool,
    stopped: bool,
}

/// What a process guest is doing.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    /// The workload: filling, running or corrupt, whether or not the machine runs at the moment.
    pub workload: State,
    /// Whether this side may run the machine: it holds the permit.
    pub holds_permit: bool,
    /// Whether the operator paused it.
    pub paused_by_operator: bool,
    /// Whether its workers run.
    pub runs: bool,
}

impl ProcessGuest {
    /// A new machine, its memory untouched, its workers parked, without a permit.
    ///
    /// # Errors
    /// A workload that is wrong, memory that does not fit, or a host that has no more.
    pub fn new(config: Config) -> Result<Self, ProcessError> {
        let params = config.params()?;
        let plan = Plan::new(&config, &params)?;
        let memory = Memory::map(&config, &plan)?;
        let marks = (config.tracker == Tracker::Software)
            .then(|| Arc::new(SoftwareBitmap::new([Run::new(0, plan.memory_pages)])));
        let workers = Workers::spawn(&config, params, plan, memory, marks.clone())?;
        let (permit, paused_by_operator, stopped) = (None, false, false);
        Ok(Self { config, params, marks, workers, permit, paused_by_operator, stopped })
    }

    /// Starts a machine that [`new`](Self::new) made and that never ran anywhere: gives it the one
    /// permit of its life.
    ///
    /// # Errors
    /// No random number for its identity, or it has a permit.
    pub fn run(&mut self) -> Result<(), GuestError> {
        let mut number = [0; 16];
        std::fs::File::open("/dev/urandom")
            .and_then(|mut f| f.read_exact(&mut number))
            .map_err(|e| self.error("reading /dev/urandom for the machine's identity", e))?;
        let permit = RunPermit::for_new_machine(u128::from_le_bytes(number));
        self.resume(permit).map_err(|(_, e)| e)
    }

    /// What it was made from.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// What it is doing.
    pub fn status(&self) -> Status {
        let filling = self.params.fill && self.counters().iter().any(|c| c.filled == 0);
        let corrupt = self.corrupt().is_some();
        let holds_permit = self.permit.is_some();
        Status {
            workload: match (corrupt, filling) {
                (true, _) => State::Corrupt,
                (false, true) => State::Filling,
                (false, false) => State::Running,
            },
            holds_permit,
            paused_by_operator: self.paused_by_operator,
            runs: holds_permit && !self.paused_by_operator && !corrupt,
        }
    }

    /// What each worker has done. `tsc` is nanoseconds since the guest was made here.
    pub fn counters(&self) -> Vec<Counters> {
        self.workers.counters()
    }

    /// The wrong page, once a worker found one. All workers stopped then.
    pub fn corrupt(&self) -> Option<Corruption> {
        self.workers.corruption()
    }

    /// The frames of the arena.
    pub fn arena(&self) -> Run {
        self.workers.plan().arena
    }

    /// Stops the machine on the operator's word; it stays paused wherever it is moved.
    ///
    /// # Errors
    /// It is not here any more.
    pub fn pause_by_operator(&mut self) -> Result<(), GuestError> {
        self.require_permit("paused")?;
        self.paused_by_operator = true;
        self.workers.park();
        Ok(())
    }

    /// Lets the machine go on after [`pause_by_operator`](Self::pause_by_operator).
    ///
    /// # Errors
    /// It is not here any more.
    pub fn resume_by_operator(&mut self) -> Result<(), GuestError> {
        self.require_permit("resumed")?;
        self.paused_by_operator = false;
        self.workers.unpark();
        Ok(())
    }

    /// Ends the machine for good: its permit is gone, its memory stays until it is dropped.
    pub fn stop(&mut self) {
        self.workers.park();
        self.permit = None;
        self.stopped = true;
    }

    /// Sets how much memory the guest shall have at most, in whole pages: its workers give back what is
    /// more, the last pages of each worker's part first, and take back what they may have again. They do
    /// so while they run; [`balloon_bytes`](Self::balloon_bytes) tells how far they are.
    ///
    /// # Errors
    /// Less than the guest can do with (its table of versions, and a page for each worker), or more than
    /// it has.
    pub fn set_balloon_target(&self, bytes: u64) -> Result<(), ProcessError> {
        let (least, most) = (self.workers.shares().least() * PAGE, self.config.memory_bytes);
        if !(least..=most).contains(&bytes) {
            let name = self.config.name.clone();
            return Err(ProcessError::Balloon { name, bytes, least, most });
        }
        self.workers.set_balloon_target(bytes / PAGE);
        Ok(())
    }

    /// How much memory the guest will have, in bytes: the target, or what is below it in whole units (huge
    /// pages); all of it, if nobody said otherwise.
    pub fn balloon_target(&self) -> u64 {
        self.workers.balloon_target() * PAGE
    }

    /// Bytes that the guest has given back at the moment.
    pub fn balloon_bytes(&self) -> u64 {
        self.workers.given_back() * PAGE
    }

    /// Why the host did not take what the guest gave back since the target was set; it uses that again.
    pub fn balloon_trouble(&self) -> Option<String> {
        self.workers.balloon_trouble()
    }

    fn load_balloon(&self, state: &StateReader, workers: &mut [Worker]) -> Result<u64, GuestError> {
        let all = self.workers.plan().memory_pages;
        let saved: BalloonState = match state.read(BALLOON, 0, STATE_VERSION) {
            Ok(saved) => saved,
            Err(StateError::Missing { .. }) => return Ok(all),
            Err(e) => return Err(self.error("its state", e)),
        };
        let can_be = |(worker, in_use): (&Worker, &u64)| (1..=worker.part().pages).contains(in_use);
        if saved.in_use.len() != workers.len()
            || !workers.iter().zip(&saved.in_use).all(can_be)
            || saved.target > all
        {
            let name = &self.config.name;
            return Err(GuestError::new(format!(
                "machine {name}: state section {BALLOON}[0] is of a machine with other memory or workers"
            )));
        }
        for (worker, in_use) in workers.iter_mut().zip(saved.in_use) {
            worker.fit(in_use, u64::MAX);
        }
        Ok(saved.target)
    }

    fn require_permit(&self, what: &str) -> Result<(), GuestError> {
        if self.permit.is_some() { Ok(()) } else { Err(self.no_permit(what)) }
    }

    fn no_permit(&self, what: &str) -> GuestError {
        let why = if self.stopped { "it was stopped" } else { "it does not run here" };
        GuestError::new(format!("machine {} cannot be {what}: {why}", self.config.name))
    }

    fn error(
        &self,
        what: &str,
        source: impl Into<Box<dyn std::error::Error + Send + Sync>>,
    ) -> GuestError {
        GuestError::with(format!("machine {}: {what}", self.config.name), source)
    }
}

impl Guest for ProcessGuest {
    fn spec(&self) -> MachineSpec {
        let worker =
            |instance| DeviceSpec { kind: WORKER.into(), instance, version: STATE_VERSION };
        MachineSpec {
            name: self.config.name.clone(),
            vmm: VMM.into(),
            extents: vec![(0, self.workers.plan().memory_pages)],
            vcpus: self.config.workers,
            cpu_features: Vec::new(),
            devices: (0..self.config.workers).map(worker).collect(),
            // Strings and numbers: it cannot fail, and an empty one would be refused.
            config: serde_json::to_vec(&self.config).unwrap_or_default(),
        }
    }

    fn machine(&self) -> Option<u128> {
        self.permit.as_ref().map(RunPermit::machine)
    }

    fn memory(&self) -> GuestView {
        self.workers.memory().view()
    }

    fn dirty_sources(&mut self) -> Result<Vec<Box<dyn DirtySource>>, GuestError> {
        Ok(vec![match &self.marks {
            Some(marks) => Box::new(Arc::clone(marks)),
            None if let Some(tracker) = self.memory().away().and_then(|away| away.tracker()) => {
                tracker
            }
            None => {
                let regions = self.memory().regions().to_vec();
                let tracker = UffdWriteProtect::new(regions).map_err(|e| {
                    self.error("its writes cannot be tracked; tracker software needs nothing", e)
                })?;
                Box::new(tracker)
            }
        }])
    }

    fn throttle(&mut self, percent: u8) -> Result<(), GuestError> {
        self.workers.throttle(percent);
        Ok(())
    }

    fn pause(&mut self) -> Result<RunPermit, GuestError> {
        let permit = self.permit.take().ok_or_else(|| self.no_permit("paused"))?;
        self.workers.park();
        Ok(permit)
    }

    fn resume(&mut self, permit: RunPermit) -> Result<(), (RunPermit, GuestError)> {
        if self.stopped {
            return Err((permit, self.no_permit("resumed")));
        }
        if self.permit.is_some() {
            let name = &self.config.name;
            return Err((permit, GuestError::new(format!("machine {name} runs already"))));
        }
        self.permit = Some(permit);
        if !self.paused_by_operator {
            self.workers.unpark();
        }
        Ok(())
    }

    fn save(&mut self, out: &mut StateWriter) -> Result<(), GuestError> {
        if self.permit.is_some() {
            return Err(GuestError::new(format!(
                "machine {} must be paused to be saved",
                self.config.name
            )));
        }
        let machine = MachineState {
            paused_by_operator: self.paused_by_operator,
            corruption: self.workers.corruption(),
        };
        let saved = |e| GuestError::with("a process guest's state cannot be written", e);
        out.put(MACHINE, 0, STATE_VERSION, STATE_VERSION, &machine).map_err(saved)?;
        let (target, workers) = (self.workers.balloon_target(), self.workers.states());
        let in_use: Vec<_> = workers.iter().map(Worker::pages_in_use).collect();
        // Hosts that know no balloon take a machine that has none.
        if target < self.workers.plan().memory_pages
            || workers.iter().any(|w| w.pages_in_use() < w.part().pages)
        {
            let state = BalloonState { target, in_use };
            out.put(BALLOON, 0, STATE_VERSION, STATE_VERSION, &state).map_err(saved)?;
        }
        for (instance, worker) in (0..).zip(&workers) {
            let state = WorkerState::of(worker);
            out.put(WORKER, instance, STATE_VERSION, STATE_VERSION, &state).map_err(saved)?;
        }
        Ok(())
    }

    fn load(&mut self, state: &StateReader) -> Result<(), GuestError> {
        if self.permit.is_some() {
            return Err(GuestError::new(format!(
                "machine {} runs; nothing can be loaded",
                self.config.name
            )));
        }
        state.require_known(&[MACHINE, WORKER, BALLOON]).map_err(|e| self.error("its state", e))?;
        let machine: MachineState =
            state.read(MACHINE, 0, STATE_VERSION).map_err(|e| self.error("its state", e))?;
        let mut workers = self.workers.states();
        for (instance, worker) in (0..).zip(&mut workers) {
            let saved: WorkerState = state
                .read(WORKER, instance, STATE_VERSION)
                .map_err(|e| self.error("its state", e))?;
            if !saved.apply(worker) {
                let name = &self.config.name;
                return Err(GuestError::new(format!(
                    "machine {name}: state section {WORKER}[{instance}] has random numbers that no worker can have"
                )));
            }
        }
        let target = self.load_balloon(state, &mut workers)?;
        self.workers.set_states(&workers);
        self.workers.set_balloon_target(target);
        self.workers
            .forget_unused()
            .map_err(|e| self.error("what its balloon holds cannot be given back", e))?;
        self.workers.set_corruption(machine.corruption);
        self.paused_by_operator = machine.paused_by_operator;
        Ok(())
    }
}

//! A machine in its hosting process: its control socket, its migrations, its end.

use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use ferry_bundle::Chain;
use ferry_memory::resident;
use ferry_migrate::{
    Fetching, Goals, Guest, Left, OutcomeKind, PermitStub, Reattach, Report, SaveCanceller,
    SaveError, SaveEvent, SaveOptions, SaveReport, SendEvent, SendHandle, SendOptions, Tuning,
    Whereabouts, reattach, save, send, words,
};
use ferry_swap::Swap;
use ferry_transport::{Identity, LinkChoice, PeerRule};

use crate::confine;
use crate::machine::{AnyMachine, PAGE_BYTES};
use crate::merged::Meter;
use crate::protocol::{
    BalloonInfo, BalloonRequest, Conversation, LimitRequest, MachineInfo, MigrateRequest, Progress,
    Reply, Request, SaveRequest, ShareReply, ShareRequest,
};
use crate::route::Route;
use crate::runtime_dir::{Reservation, RuntimeError, check_peer};
use crate::sharer::Sharer;

/// What a guest says of its memory is waited for no longer than this; the last that it said is shown then.
const GUEST_ANSWERS_WITHIN: Duration = Duration::from_secs(2);

/// How a machine's stay on this host ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ending {
    Moved(Route),
    Saved(PathBuf),
    Stopped,
    /// The guest ended, and how.
    Ended(String),
}

/// A machine that this process hosts.
pub(crate) struct Hosted {
    machine: AnyMachine,
    reservation: Reservation,
    /// Its lock is taken before that of `inner`, or alone.
    sharer: Sharer,
    merged: Meter,
    inner: Mutex<Inner>,
    over: Condvar,
}

#[derive(Default)]
struct Inner {
    migrating: Option<(Route, SendHandle)>,
    saving: Option<(PathBuf, SaveCanceller)>,
    in_doubt: Option<PermitStub>,
    /// It runs elsewhere, and lacks pages that are here.
    detached: Option<Reattach>,
    /// It runs here, and lacks pages that are elsewhere, or in files.
    fetching: Option<Fetching>,
    /// Its cold pages may be elsewhere than in memory.
    swap: Option<Swap>,
    /// It was stopped: what its guest makes of that is not how it ended.
    stopped: bool,
    ending: Option<Ending>,
}

impl Hosted {
    /// Hosts `machine` under its reserved name: answers on its control socket from here on.
    pub(crate) fn start(
        machine: AnyMachine,
        reservation: Reservation,
    ) -> Result<Arc<Self>, RuntimeError> {
        let listener = reservation.listen()?;
        let hosted = Arc::new(Self {
            machine,
            reservation,
            sharer: Sharer::default(),
            merged: Meter::default(),
            inner: Mutex::default(),
            over: Condvar::new(),
        });
        let server = Arc::downgrade(&hosted);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let Some(hosted) = server.upgrade() else { return };
                match stream {
                    Ok(stream) => drop(std::thread::spawn(move || hosted.converse(stream))),
                    Err(_) if hosted.reservation.is_released() => return,
                    // Out of descriptors, perhaps: not for ever.
                    Err(_) => std::thread::sleep(Duration::from_millis(100)),
                }
            }
        });
        let watcher = Arc::downgrade(&hosted);
        std::thread::spawn(move || {
            while let Some(hosted) = watcher.upgrade() {
                if hosted.inner().ending.is_some() {
                    return;
                }
                hosted.sharer.rest();
                if let Some(how) = hosted.machine.wait_ended(Duration::from_millis(200)) {
                    return hosted.end(Ending::Ended(how));
                }
            }
        });
        Ok(hosted)
    }

    /// Says whether pages of the machine are still at its source, or in its bundle.
    pub(crate) fn set_fetching(&self, fetching: Option<Fetching>) {
        self.inner().fetching = fetching;
    }

    /// Says by what its cold pages leave memory.
    pub(crate) fn set_swap(&self, swap: Option<Swap>) {
        self.inner().swap = swap;
    }

    pub(crate) fn name(&self) -> &str {
        self.reservation.name()
    }

    /// Waits until the machine's stay here is over.
    pub(crate) fn wait(&self) -> Ending {
        let mut inner = self.inner();
        loop {
            if let Some(ending) = inner.ending.clone() {
                drop(inner);
                self.sharer.end();
                return ending;
            }
            inner = self.over.wait(inner).unwrap_or_else(PoisonError::into_inner);
        }
    }

    fn inner(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn end(&self, ending: Ending) {
        let mut inner = self.inner();
        if inner.stopped && matches!(ending, Ending::Ended(_)) {
            return;
        }
        if inner.ending.is_none() {
            inner.ending = Some(ending);
        }
        self.over.notify_all();
    }

    fn converse(&self, stream: UnixStream) {
        // A client that says nothing does not keep a thread for ever.
        let _ = stream.set_read_timeout(Some(Duration::from_secs(10)));
        let may = check_peer(&stream);
        let mut client = Conversation::new(stream);
        if let Err(why) = may {
            let _ = client.say(&Reply::Error(why));
            return;
        }
        let request = match client.hear::<Request>() {
            Ok(Some(request)) => request,
            Ok(None) => return,
            Err(e) => {
                let _ = client.say(&Reply::Error(format!("not a request: {e}")));
                return;
            }
        };
        let mut ending = None;
        let reply = match request {
            Request::Show => Ok(Reply::Machine(Box::new(self.info()))),
            Request::Cpu => self.machine.cpu().map(|cpu| Reply::Cpu(Box::new(cpu))),
            Request::Pause => self.pause(),
            Request::Resume { destination_is_dead } => self.resume(destination_is_dead),
            Request::Stop => self.stop().inspect(|_| ending = Some(Ending::Stopped)),
            Request::Cancel => self.cancel(),
            Request::Tune(tuning) => self.tune(tuning),
            Request::Migrate(how) => {
                let to = how.to.clone();
                let report = self.migrate(&how, &mut client);
                if report.as_ref().is_ok_and(|r| r.outcome == OutcomeKind::Completed) {
                    ending = Some(Ending::Moved(to));
                }
                report.map(|r| Reply::Report(Box::new(r)))
            }
            Request::Limit(what) => self.limit(&what),
            Request::Share(what) => self.share(*what).map(|reply| Reply::Shared(Box::new(reply))),
            Request::Balloon(what) => {
                self.balloon(&what).map(|info| Reply::Balloon(Box::new(info)))
            }
            Request::Save(how) => self.save(&how, &mut client).map(|report| {
                ending = how.stop.then_some(Ending::Saved(how.dir));
                Reply::Saved(Box::new(report))
            }),
        };
        if ending.is_some() {
            // Whoever hears that the machine is gone may bring it back at once.
            self.reservation.release();
        }
        // A client that is gone misses the reply; what it asked for is done.
        let _ = client.say(&reply.unwrap_or_else(Reply::Error));
        if let Some(ending) = ending {
            self.end(ending);
        }
    }

    fn info(&self) -> MachineInfo {
        let spec = self.machine.spec();
        let merged = self.merged.read(&self.machine.memory());
        // A vCPU may wait for a page with the device's lock held: whoever stops it needs ours.
        let (in_doubt, detached, fetching, swap, migrating_to, saving_to) = {
            let inner = self.inner();
            (
                inner.in_doubt.is_some(),
                inner.detached.is_some(),
                inner.fetching.clone(),
                inner.swap.clone(),
                inner.migrating.as_ref().map(|(to, _)| to.clone()),
                inner.saving.as_ref().map(|(to, _)| to.clone()),
            )
        };
        let state = match &fetching {
            _ if in_doubt => "paused in doubt".into(),
            _ if detached => "moved, its pages still here".into(),
            Some(fetching) => {
                let (state, missing) = (self.machine.state(), fetching.missing());
                match fetching.trouble() {
                    None => format!("{state}, fetching {missing} pages"),
                    Some(why) => format!("{state}, lacks {missing} pages: {why}"),
                }
            }
            None => self.machine.state(),
        };
        let resident = self.resident();
        let lacks = |gfn| fetching.as_ref().is_some_and(|fetching| fetching.lacks(gfn));
        let counters = self.machine.counters(lacks);
        MachineInfo {
            name: self.name().to_owned(),
            kind: self.machine.kind().into(),
            state,
            memory_bytes: spec.memory_bytes(),
            resident_bytes: resident * PAGE_BYTES,
            cpus: spec.vcpus,
            dirty_log: self.machine.dirty_log(),
            pid: std::process::id(),
            migrating_to,
            saving_to,
            pages_written: counters.map(|c| c.0),
            pages_checked: counters.map(|c| c.1),
            merged_bytes: merged.bytes,
            merged_saves_bytes: merged.saves_bytes,
            merged_zero_bytes: merged.zero_bytes,
            sharing: self.sharer.last(),
            swap: swap.as_ref().map(Swap::figures),
            // The device may wait for a page of its own that does not come.
            balloon: fetching.is_none().then(|| self.machine.balloon()),
        }
    }

    /// Refuses what must not be done to a machine under way or in doubt.
    fn check_at_rest(&self, inner: &Inner) -> Result<(), String> {
        let name = self.name();
        if let Some((to, _)) = &inner.migrating {
            return Err(format!(
                "machine `{name}` is moving to {to}; wait, or `ferry cancel {name}`"
            ));
        }
        if let Some((to, _)) = &inner.saving {
            return Err(format!(
                "machine `{name}` is being saved to {}; wait, or `ferry cancel {name}`",
                to.display()
            ));
        }
        if let Some(fetching) = &inner.fetching {
            return Err(match fetching.trouble() {
                None => format!(
                    "machine `{name}` runs here and is still fetching pages: wait until all are here (`ferry vm show \
                     {name}`)"
                ),
                Some(why) => {
                    format!(
                        "machine `{name}` lacks pages that cannot be had, and can only be stopped: {why}"
                    )
                }
            });
        }
        if inner.detached.as_ref().is_some_and(Reattach::is_in_doubt) {
            return Err(format!(
                "machine `{name}` is paused: its last migration sent the run permit and lost the destination. \
                 `ferry migrate --resume {name} --to ADDR` asks there and goes on; if you have made sure that \
                 it does not run there, `ferry vm resume {name} --destination-is-dead` here"
            ));
        }
        if inner.detached.is_some() {
            return Err(format!(
                "machine `{name}` runs elsewhere and lacks pages that are only here: `ferry migrate --resume \
                 {name} --to ADDR` goes on; if you have made sure that it does not run there, `ferry vm resume \
                 {name} --destination-is-dead` lets it go on here as it was at the hand-over"
            ));
        }
        if inner.in_doubt.is_some() {
            return Err(format!(
                "machine `{name}` is paused: its last migration sent the run permit and lost the destination. \
                 If it runs there, `ferry vm stop {name}` here; if you have made sure that it does not, \
                 `ferry vm resume {name} --destination-is-dead`"
            ));
        }
        Ok(())
    }

    fn pause(&self) -> Result<Reply, String> {
        self.check_at_rest(&self.inner())?;
        self.machine.pause_by_operator()?;
        Ok(Reply::Done(format!("machine `{}` is paused", self.name())))
    }

    fn resume(&self, destination_is_dead: bool) -> Result<Reply, String> {
        let mut inner = self.inner();
        let fenced = if destination_is_dead {
            let in_doubt = inner.in_doubt.take().map(PermitStub::fenced_by_operator);
            in_doubt.or_else(|| inner.detached.take().and_then(Reattach::fenced_by_operator))
        } else {
            None
        };
        if let Some(permit) = fenced {
            let mut machine = self.machine.clone();
            // A permit that cannot be used here is not handed out again: the machine can only be stopped.
            machine.resume(permit).map_err(|(_permit, e)| e.to_string())?;
            return Ok(Reply::Done(format!("machine `{}` goes on here", self.name())));
        }
        self.check_at_rest(&inner)?;
        self.machine.resume_by_operator()?;
        Ok(Reply::Done(format!("machine `{}` runs", self.name())))
    }

    fn stop(&self) -> Result<Reply, String> {
        let mut inner = self.inner();
        if inner.migrating.is_some() || inner.saving.is_some() {
            self.check_at_rest(&inner)?;
        }
        match (inner.fetching.clone(), inner.swap.clone()) {
            (None, None) => self.machine.stop(),
            (None, Some(swap)) => std::thread::scope(|scope| {
                let stopping = scope.spawn(|| self.machine.stop());
                std::thread::sleep(Duration::from_millis(200));
                // Of pages that cannot be read there is no end of waiting.
                if !stopping.is_finished() {
                    swap.abandon();
                }
            }),
            (Some(fetching), _) => std::thread::scope(|scope| {
                scope.spawn(|| self.machine.stop());
                // vCPUs that wait for a page end when it will not come; by now they know that they shall.
                std::thread::sleep(Duration::from_millis(20));
                fetching.abandon();
            }),
        }
        inner.stopped = true;
        Ok(Reply::Done(format!("machine `{}` is stopped", self.name())))
    }

    /// Pages in memory.
    fn resident(&self) -> u64 {
        resident(self.machine.memory().regions()).map_or(0, |pages| pages.len())
    }

    /// Has the machine keep within so much memory from now on.
    pub(crate) fn limit(&self, what: &LimitRequest) -> Result<Reply, String> {
        let (mut inner, name) = (self.inner(), self.name());
        if inner.fetching.is_some() {
            self.check_at_rest(&inner)?;
        }
        let swap = match (&inner.swap, &what.swap) {
            (Some(swap), _) => swap.clone(),
            (None, Some(options)) => {
                options.dir.as_deref().map_or(Ok(()), confine::may_write)?;
                Swap::new(&self.machine.memory(), options).map_err(|e| words(&e))?
            }
            (None, None) if what.bytes.is_none() => {
                return Ok(Reply::Done(format!("machine `{name}` has no limit")));
            }
            (None, None) => {
                return Err(format!(
                    "machine `{name}` has no swap: say how much memory compressed pages may take (--swap-pool)"
                ));
            }
        };
        // From here on pages may be with it.
        inner.swap = Some(swap.clone());
        drop(inner);
        let set = || swap.set_limit(what.bytes);
        let limited = match swap.figures().limit_bytes {
            // The trackers for sharing are in its way where they watch the same memory, the first time.
            None => self.sharer.aside(set),
            Some(_) => set(),
        };
        limited.map_err(|e| words(&e))?;
        Ok(Reply::Done(match what.bytes {
            Some(bytes) => format!("machine `{name}` keeps within {} MiB of memory", bytes >> 20),
            None => format!("machine `{name}` has no limit"),
        }))
    }

    fn share(&self, what: ShareRequest) -> Result<ShareReply, String> {
        // A pass takes a moment, and merging seconds: nobody else waits for it.
        let swap = || self.inner().swap.clone();
        let refuse = || self.check_at_rest(&self.inner());
        refuse()?;
        let (info, fingerprints) = self.sharer.pass(&self.machine, swap, refuse, what)?;
        let merged = self.merged.read(&self.machine.memory());
        let merged_pages = (merged.bytes + merged.zero_bytes) / PAGE_BYTES;
        Ok(ShareReply { info, merged_pages, fingerprints })
    }

    fn balloon(&self, what: &BalloonRequest) -> Result<BalloonInfo, String> {
        if self.inner().fetching.is_some() {
            self.check_at_rest(&self.inner())?;
        }
        let before = self.machine.balloon();
        if let Some(bytes) = what.target_bytes {
            self.machine.set_balloon_target(bytes)?;
        }
        if what.ask_guest && before.driver && self.machine.ask_balloon_statistics() {
            let begun = Instant::now();
            while begun.elapsed() < GUEST_ANSWERS_WITHIN
                && self.machine.balloon().statistics_count == before.statistics_count
            {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        Ok(BalloonInfo {
            resident_bytes: self.resident() * PAGE_BYTES,
            balloon: self.machine.balloon(),
        })
    }

    fn cancel(&self) -> Result<Reply, String> {
        let (inner, name) = (self.inner(), self.name());
        match (&inner.migrating, &inner.saving) {
            (Some((to, handle)), _) => {
                handle.cancel();
                Ok(Reply::Done(format!("cancelling the move of `{name}` to {to}")))
            }
            (None, Some((to, canceller))) => {
                canceller.cancel();
                Ok(Reply::Done(format!("cancelling the save of `{name}` to {}", to.display())))
            }
            (None, None) => Err(format!("machine `{name}` is not moving or being saved")),
        }
    }

    fn tune(&self, tuning: Tuning) -> Result<Reply, String> {
        let name = self.name();
        let inner = self.inner();
        let Some((to, handle)) = &inner.migrating else {
            return Err(format!("machine `{name}` is not moving"));
        };
        handle.tune(tuning);
        Ok(Reply::Done(format!("the move of `{name}` to {to} goes on by these goals")))
    }

    fn migrate(&self, how: &MigrateRequest, client: &mut Conversation) -> Result<Report, String> {
        {
            let inner = self.inner();
            // Whoever reads the report must not take it for running.
            match self.check_at_rest(&inner) {
                Err(why) if inner.in_doubt.is_some() => {
                    return Ok(Report::not_begun(why, Whereabouts::PausedAtSource));
                }
                Err(why) if let (Some(left), false) = (&inner.detached, how.resume) => {
                    let machine = match left.is_in_doubt() {
                        true => Whereabouts::PausedAtSource,
                        false => Whereabouts::LacksPages,
                    };
                    return Ok(Report::not_begun(why, machine));
                }
                _ if how.resume && inner.detached.is_none() => {
                    return Err(format!(
                        "machine `{}` has no move to go on with: leave out --resume",
                        self.name()
                    ));
                }
                _ => {}
            }
        }
        confine::may_read(&how.identity)?;
        if let Some(dir) = &how.spool {
            confine::may_write(dir)?;
            ferry_migrate::check_spool(dir).map_err(|e| words(&e))?;
        }
        let identity = Identity::load(&how.identity).map_err(|e| e.to_string())?;
        let link = how.link.as_deref().map(str::parse::<LinkChoice>).transpose()?;
        let link = confine::link(link.unwrap_or_default())?;
        let peer = how.peer.as_deref().map(str::parse::<PeerRule>).transpose()?;
        let connector = how.to.connector(&identity, link, peer.as_ref());
        let connector = connector.map_err(|e| e.to_string())?;
        let handle = SendHandle::default();
        let detached = {
            let mut inner = self.inner();
            let take = how.resume && inner.migrating.is_none();
            let detached = inner.detached.take_if(|_| take);
            self.check_at_rest(&inner)?;
            inner.migrating = Some((how.to.clone(), handle.clone()));
            detached
        };
        self.sharer.aside(|| ());
        let options = SendOptions {
            goals: Goals {
                max_downtime: Duration::from_micros(how.max_downtime_us),
                max_total: Duration::from_micros(how.max_total_us),
                max_slowdown: how.max_slowdown,
            },
            bandwidth_bytes_per_s: how.bandwidth_bytes_per_s,
            mode: how.mode.into(),
            look_only: how.look_only,
            rejoin_for: Duration::from_millis(how.rejoin_ms),
            spool: how.spool.clone(),
            lanes: SendOptions::default().lanes.max(how.to.len()),
            ..SendOptions::default()
        };
        let mut progress = Progress::default();
        let mut machine = self.machine.clone();
        let mut watch = |event| {
            follow(&mut progress, event);
            // A client that is gone does not end the migration.
            let _ = client.say(&Reply::Progress(progress.clone()));
            progress.words = None;
        };
        let watch = &mut watch;
        let sent = match detached {
            None => send(&mut machine, connector, &options, &handle, watch),
            Some(left) => reattach(&mut machine, left, connector, &options, &handle, watch),
        };
        let mut inner = self.inner();
        inner.migrating = None;
        match sent.left {
            Left::Running => {}
            Left::Nothing => {
                if let AnyMachine::Kvm(m) = &self.machine {
                    m.set_moved();
                }
            }
            Left::InDoubt(stub) => inner.in_doubt = Some(stub),
            Left::Detached(reattach) => inner.detached = Some(reattach),
            Left::Stopped(_permit, e) => {
                tracing::error!(
                    "machine {} could not go on after its migration failed: {e}",
                    self.name()
                );
            }
        }
        Ok(sent.report)
    }

    fn save(&self, how: &SaveRequest, client: &mut Conversation) -> Result<SaveReport, String> {
        confine::may_write(&how.dir)?;
        how.base.as_deref().map_or(Ok(()), confine::may_read)?;
        let canceller = SaveCanceller::default();
        {
            let mut inner = self.inner();
            self.check_at_rest(&inner)?;
            inner.saving = Some((how.dir.clone(), canceller.clone()));
        }
        self.sharer.aside(|| ());
        let mut progress = Progress::default();
        let mut watch = |event| {
            follow_save(&mut progress, &event);
            // A client that is gone does not end the save.
            let _ = client.say(&Reply::Progress(progress.clone()));
            progress.words = None;
        };
        let mut machine = self.machine.clone();
        let base = how.base.as_deref().map(|base| Chain::open(base, &[]).map(Arc::new)).transpose();
        let saved = base.map_err(SaveError::from).and_then(|base| {
            let max_stop = Duration::from_millis(how.max_stop_ms);
            let options = SaveOptions { base, stop: how.stop, max_stop };
            save(&mut machine, &how.dir, &options, &canceller, &mut watch)
        });
        if saved.is_ok() && how.stop {
            self.machine.stop();
        }
        self.inner().saving = None;
        saved.map_err(|e| match e {
            SaveError::NotResumed { .. } => words(&e),
            e => format!("machine `{}` was not saved, and goes on: {}", self.name(), words(&e)),
        })
    }
}

/// Brings `progress` up to date.
fn follow_save(progress: &mut Progress, event: &SaveEvent) {
    progress.words = Some(match *event {
        SaveEvent::Round { round, pages } => {
            progress.round = round;
            progress.round_pages = pages;
            format!("round {round}: {pages} pages")
        }
        SaveEvent::Written { bytes } => {
            progress.sent_bytes = bytes;
            return;
        }
        SaveEvent::GoesOn(stood) => {
            format!("the guest stood still for {:.1} ms", stood.as_secs_f64() * 1e3)
        }
        SaveEvent::Syncing => "all is written; waiting for the disk".into(),
    });
}

/// Brings `progress` up to date.
pub(crate) fn follow(progress: &mut Progress, event: SendEvent) {
    use ferry_migrate::Progress as P;
    let event = match event {
        SendEvent::Sent { bytes, .. } => {
            progress.sent_bytes = bytes;
            return;
        }
        SendEvent::Spooled(Ok(bytes)) => {
            progress.words =
                Some(format!("all that it fetches is in the spool, too ({bytes} bytes)"));
            return;
        }
        SendEvent::Spooled(Err(why)) => {
            progress.words =
                Some(format!("NO SPOOL was written ({why}); the move goes on without"));
            return;
        }
        SendEvent::Progress(p) => p,
    };
    progress.words = Some(match event {
        P::Accepted => "the destination takes the machine".into(),
        P::Sampled => "link and guest were looked at".into(),
        P::RoundStarted { round, pages } => {
            progress.round = round;
            progress.round_pages = pages;
            format!("round {round}: {pages} pages")
        }
        P::RoundDone { facts, rate_bytes_per_s, expected_downtime, decision, .. } => {
            progress.rate_bytes_per_s = rate_bytes_per_s;
            progress.dirty_pages_per_s = facts.dirty as f64 / facts.took.as_secs_f64().max(1e-6);
            progress.expected_downtime_ms = Some(expected_downtime.as_secs_f64() * 1e3);
            format!(
                "round {} took {:.1} ms, {:.1} MiB: {}",
                facts.round,
                facts.took.as_secs_f64() * 1e3,
                facts.bytes as f64 / f64::from(1 << 20),
                decision.why(),
            )
        }
        P::Paused => "the guest stands still".into(),
        P::Committed => "the run permit is on its way".into(),
        P::Running => "the machine runs at the destination".into(),
        P::Fetching { pages } => format!("it fetches {pages} pages"),
        P::LinkLost(why) => format!("{why}; trying to come back"),
        P::InDoubt(why) => format!("{why}; asking the destination what became of the machine"),
    });
}

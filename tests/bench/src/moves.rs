//! Guests, and moving them over QUIC on loopback.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use ferry_guest::status::{self, State, StatusView};
use ferry_migrate::{
    Guest, Host, Left, OutcomeKind, Progress, ReceiveEvent, ReceiveOptions, Report, SendEvent,
    SendHandle, SendOptions, receive, send,
};
use ferry_pages::PAGE_BYTES;
use ferry_process_guest::{Config, ProcessGuest, Tracker};
use ferry_refvmm::{DirtyLog, Machine, MachineConfig, RefHost, SerialSink};
use ferry_transport::{
    Connector, EitherConnector, Identity, LinkChoice, Listener, Over, Sockets, pki,
};
use tokio::runtime::Runtime;

use crate::Failure;
use crate::figures::cpu_time;

/// A private authority with two hosts, and files that guests boot from.
pub(crate) struct Pki {
    dir: tempfile::TempDir,
}

impl Pki {
    pub(crate) fn new() -> Result<Self, Failure> {
        let dir = tempfile::tempdir()?;
        pki::init(dir.path(), &["source".to_owned(), "destination".to_owned()])?;
        Ok(Self { dir })
    }

    pub(crate) fn destination(&self) -> Result<Identity, Failure> {
        Ok(Identity::load(&self.dir.path().join("destination"))?)
    }

    pub(crate) fn source(&self) -> Result<Identity, Failure> {
        Ok(Identity::load(&self.dir.path().join("source"))?)
    }

    /// Loopback, any port.
    pub(crate) fn any() -> SocketAddr {
        (Ipv4Addr::LOCALHOST, 0).into()
    }

    fn kernel(&self) -> Result<PathBuf, Failure> {
        let path = self.dir.path().join("ferry-guest.elf");
        std::fs::write(&path, ferry_guest::ELF)?;
        Ok(path)
    }
}

/// The runtime that a destination lives on, its threads called `name` (for profilers).
pub(crate) fn runtime(name: &str) -> Result<Runtime, Failure> {
    Ok(tokio::runtime::Builder::new_multi_thread().enable_all().thread_name(name).build()?)
}

/// A host that takes guests in.
pub(crate) struct Destination<G> {
    _runtime: Runtime,
    connector: Arc<dyn Connector>,
    events: Receiver<ReceiveEvent<G>>,
}

impl<G: Guest + 'static> Destination<G> {
    pub(crate) fn new<H: Host<Guest = G> + 'static>(pki: &Pki, host: H) -> Result<Self, Failure> {
        Self::on(pki, host, LinkChoice::Only(Over::Quic))
    }

    /// One that is reached over this link.
    pub(crate) fn on<H: Host<Guest = G> + 'static>(
        pki: &Pki,
        host: H,
        link: LinkChoice,
    ) -> Result<Self, Failure> {
        let runtime = runtime("destination")?;
        let identity = pki.destination()?;
        let listener =
            runtime.block_on(async { Sockets::bind(Pki::any(), link)?.listen(&identity) })?;
        let to = listener.local_addr().ok_or("no address")?;
        let (sender, events) = channel();
        let tell = move |event| {
            let _ = sender.send(event);
        };
        runtime.spawn(receive(Box::new(listener), Arc::new(host), ReceiveOptions::default(), tell));
        let connector = Arc::new(EitherConnector::new(&pki.source()?, to, link)?);
        Ok(Self { _runtime: runtime, connector, events })
    }

    /// Moves `guest` here; only a move with the right memory at the end counts. Also tells the CPU time
    /// until the guest ran here.
    pub(crate) fn take(
        &self,
        mut guest: G,
        options: &SendOptions,
    ) -> Result<(Report, Duration, G), Failure> {
        let connector = self.connector.clone();
        let (cpu_before, mut cpu) = (cpu_time(), Duration::ZERO);
        let mut watch = |event| {
            if matches!(event, SendEvent::Progress(Progress::Running)) {
                cpu = cpu_time().saturating_sub(cpu_before);
            }
        };
        let sent = send(&mut guest, connector, options, &SendHandle::default(), &mut watch);
        let report = sent.report;
        let whole = report.outcome == OutcomeKind::Completed && report.digest_verified;
        if !whole || !matches!(sent.left, Left::Nothing) {
            return Err(format!("a move failed: {report:?}").into());
        }
        drop(guest);
        let mut arrived = None;
        loop {
            match self.events.recv_timeout(Duration::from_secs(10))? {
                ReceiveEvent::Arrived { guest, .. } => arrived = Some(guest),
                ReceiveEvent::Ended { .. } => break,
                ReceiveEvent::Arriving { .. }
                | ReceiveEvent::Waiting { .. }
                | ReceiveEvent::Recalled { .. }
                | ReceiveEvent::Turned(_) => {}
            }
        }
        Ok((report, cpu, arrived.ok_or("no machine arrived")?))
    }
}

/// A process guest with a worker that does `workload`, its fill done.
pub(crate) fn process(memory_bytes: u64, workload: &str) -> Result<ProcessGuest, Failure> {
    let config = Config {
        name: "bench".into(),
        memory_bytes,
        huge_pages: false,
        workers: 1,
        workload: workload.into(),
        tracker: Tracker::default(),
    };
    let mut guest = ProcessGuest::new(config)?;
    guest.run()?;
    wait(|| Ok(guest.status().workload == State::Running))?;
    Ok(guest)
}

/// A KVM guest with a vCPU that does `workload`, its fill done.
pub(crate) fn kvm(pki: &Pki, memory_bytes: u64, workload: &str) -> Result<Machine, Failure> {
    // For workloads with a rate.
    let tsc_khz = RefHost::tsc_khz()?;
    let machine = Machine::boot(&MachineConfig {
        name: "bench".into(),
        memory_bytes,
        huge_pages: false,
        cpus: 1,
        cpu: None,
        kernel: pki.kernel()?,
        initrd: None,
        cmdline: format!("tsc_khz={tsc_khz} {workload}"),
        dirty_log: DirtyLog::Auto,
        serial: SerialSink::Discard,
    })?;
    machine.resume_by_operator()?;
    let memory = machine.memory();
    wait(|| {
        if let Some(how) = machine.wait_ended(Duration::ZERO) {
            return Err(how.to_string().into());
        }
        let mut page = vec![0; status::BYTES];
        memory.read(status::GPA / PAGE_BYTES as u64, &mut page)?;
        let state = StatusView::parse(&page).ok().and_then(|view| view.state());
        Ok(state == Some(State::Running))
    })?;
    Ok(machine)
}

fn wait(mut ready: impl FnMut() -> Result<bool, Failure>) -> Result<(), Failure> {
    let began = Instant::now();
    while !ready()? {
        if began.elapsed() > Duration::from_secs(120) {
            return Err("the guest did not fill its memory within two minutes".into());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}

//! `ferry receive`: takes machines in and hosts them.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use ferry_migrate::{
    Arrival, Guest, Host, MachineSpec, ReceiveEvent, ReceiveOptions, Refusal, receive, words,
};
use ferry_process_guest::ProcessHost;
use ferry_refvmm::{RefHost, SerialSink};
use ferry_swap::Swap;
use ferry_transport::{Listener, Sockets};

use crate::Failure;
use crate::args::Receive;
use crate::cpu;
use crate::hosted::{Ending, Hosted};
use crate::machine::AnyMachine;
use crate::runtime_dir::{Reservation, RuntimeDir};

/// A host for both kinds of machine.
struct AnyHost {
    runtime: RuntimeDir,
    name: Option<String>,
    kvm: RefHost,
    /// Names of machines on their way in, by their name at the source.
    reserved: Mutex<HashMap<String, Reservation>>,
    /// By what cold pages of machines leave memory; none, and they stay.
    swap: Option<ferry_swap::Options>,
    /// Of machines on their way in, by their name at the source.
    swaps: Mutex<HashMap<String, Swap>>,
    /// Machines that run here and fetch pages, by their name at the source.
    fetching: Mutex<HashMap<String, Weak<Hosted>>>,
}

impl AnyHost {
    fn take_reservation(&self, source_name: &str) -> Option<Reservation> {
        self.reserved.lock().unwrap_or_else(PoisonError::into_inner).remove(source_name)
    }

    fn swaps(&self) -> MutexGuard<'_, HashMap<String, Swap>> {
        self.swaps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn fetching(&self) -> MutexGuard<'_, HashMap<String, Weak<Hosted>>> {
        self.fetching.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Host for AnyHost {
    type Guest = AnyMachine;

    fn prepare(&self, spec: &MachineSpec) -> Result<AnyMachine, Vec<Refusal>> {
        let name = self.name.as_deref().unwrap_or(&spec.name);
        let reservation =
            self.runtime.reserve(name).map_err(|e| vec![Refusal::new("name", e.to_string())])?;
        let machine = match spec.vmm.as_str() {
            ferry_process_guest::VMM => {
                // Under the name that it has here, it moves on.
                let spec = MachineSpec { name: name.to_owned(), ..spec.clone() };
                let host = ProcessHost {
                    huge_pages: self.kvm.arrival.huge_pages,
                    ..ProcessHost::default()
                };
                host.prepare(&spec).map(AnyMachine::process)
            }
            _ => self.kvm.prepare(spec).map(AnyMachine::Kvm),
        }?;
        if let Some(options) = &self.swap {
            let swap = Swap::new(&machine.memory(), options)
                .map_err(|e| vec![Refusal::new("memory", words(&e))])?;
            self.swaps().insert(spec.name.clone(), swap);
        }
        let mut reserved = self.reserved.lock().unwrap_or_else(PoisonError::into_inner);
        reserved.insert(spec.name.clone(), reservation);
        Ok(machine)
    }

    fn available_bytes(&self) -> u64 {
        self.kvm.available_bytes()
    }
}

enum Notice {
    Hosted(Arc<Hosted>),
    Ended(Ending, String),
}

pub(crate) fn main(runtime: RuntimeDir, args: &Receive) -> Result<(), Failure> {
    let identity = crate::load_identity(&args.identity)?;
    let admission = crate::allowed(args.allow.as_ref())?;
    if let Some(name) = &args.name {
        // Says now what would otherwise be said to the first source.
        drop(runtime.reserve(name)?);
    }
    if let Some(path) = &args.serial {
        // As above.
        let opened = OpenOptions::new().append(true).create(true).mode(0o600).open(path);
        opened.map_err(|e| {
            Failure::words(format!("cannot open serial output {}: {e}", path.display()))
        })?;
    }
    for place in &args.bundles {
        // As above.
        place.read_dir().map_err(|e| {
            Failure::words(format!("cannot read bundles in {} (--bundles): {e}", place.display()))
        })?;
    }
    let cpu = args.cpu.as_deref().map(cpu::read).transpose()?;
    if let (Some(file), Some(cpu)) = (&args.cpu, &cpu) {
        let lacks = RefHost::cpu()?.lacks(cpu).join(", ");
        if !lacks.is_empty() {
            return Err(Failure::words(format!("this host lacks, of {}: {lacks}", file.display())));
        }
    }
    // Before: a confined process makes no socket for TCP.
    let sockets = Sockets::bind(args.listen.addr, args.listen.link)?;
    let confined = crate::confine::receiver(&runtime, args)?;
    let host = Arc::new(AnyHost {
        runtime,
        name: args.name.clone(),
        kvm: RefHost {
            arrival: ferry_refvmm::Arrival {
                name: args.name.clone(),
                huge_pages: args.huge_pages,
                cpu,
                dirty_log: args.dirty_log.into(),
                serial: args.serial.clone().map_or(SerialSink::Stdout, SerialSink::File),
            },
        },
        reserved: Mutex::default(),
        swap: args.swap.options(),
        swaps: Mutex::default(),
        fetching: Mutex::default(),
    });
    let tokio = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let listener = {
        let _context = tokio.enter();
        sockets.listen(&identity)?
    };
    let addr = listener.local_addr().unwrap_or(args.listen.addr);
    eprintln!("ferry: receiving on {addr} as `{}`, {confined}", identity.name());
    let (notices, noticed) = channel();
    let tell = {
        let host = host.clone();
        move |event| arrival_event(&host, event, &notices)
    };
    let (once, bundles) = (args.once, args.bundles.clone());
    let max_memory_bytes = args.max_memory;
    let options =
        ReceiveOptions { once, bundles, admission, max_memory_bytes, ..ReceiveOptions::default() };
    tokio.spawn(receive(Box::new(listener), host, options, tell));
    for notice in noticed {
        match notice {
            Notice::Hosted(hosted) => eprintln!("ferry: machine `{}` runs here", hosted.name()),
            Notice::Ended(ending, name) => {
                let finished = crate::vm::finish(&ending, &name);
                if args.once {
                    return finished;
                }
                if let Err(e) = finished {
                    eprintln!("ferry: {e}");
                }
            }
        }
    }
    Ok(())
}

fn arrival_event(host: &AnyHost, event: ReceiveEvent<AnyMachine>, notices: &Sender<Notice>) {
    match event {
        ReceiveEvent::Arriving { name, peer } => {
            eprintln!("ferry: machine `{name}` is coming from {peer}")
        }
        ReceiveEvent::Recalled { name, bundle, pages: Ok(pages) } => eprintln!(
            "ferry: machine `{name}`: {pages} of its pages are in {} as they were: only what differs is sent",
            bundle.display()
        ),
        ReceiveEvent::Recalled { name, bundle, pages: Err(why) } => eprintln!(
            "ferry: machine `{name}`: {} is of no use, and its pages are sent: {why}",
            bundle.display()
        ),
        ReceiveEvent::Arrived { guest, spec, fetching } => {
            let Some(reservation) = host.take_reservation(&spec.name) else { return };
            let name = reservation.name().to_owned();
            match Hosted::start(guest.clone(), reservation) {
                Ok(hosted) => {
                    hosted.set_swap(host.swaps().remove(&spec.name));
                    if fetching.is_some() {
                        hosted.set_fetching(fetching);
                        host.fetching().insert(spec.name, Arc::downgrade(&hosted));
                    }
                    let _ = notices.send(Notice::Hosted(hosted.clone()));
                    let notices = notices.clone();
                    std::thread::spawn(move || {
                        let ending = hosted.wait();
                        drop(hosted);
                        let _ = notices.send(Notice::Ended(ending, name));
                    });
                }
                // It runs, and must not be lost for want of a socket: it runs on until the process ends.
                Err(e) => {
                    eprintln!("ferry: machine `{name}` runs here but cannot be controlled: {e}");
                    std::mem::forget(guest);
                }
            }
        }
        ReceiveEvent::Ended { name, arrival } => {
            drop(host.take_reservation(&name));
            drop(host.swaps().remove(&name));
            if let Some(hosted) = host.fetching().remove(&name).and_then(|weak| weak.upgrade()) {
                hosted.set_fetching(None);
            }
            match arrival {
                Arrival::Runs { digest_verified: Some(true) } => {
                    eprintln!("ferry: machine `{name}`: its memory is the same as at the source");
                }
                Arrival::Runs { digest_verified: Some(false) } => {
                    eprintln!(
                        "ferry: machine `{name}`: ITS MEMORY IS NOT WHAT IT WAS AT THE SOURCE: stop it"
                    );
                }
                Arrival::Runs { digest_verified: None } => {
                    eprintln!(
                        "ferry: machine `{name}`: the link was lost before memory was compared"
                    );
                }
                Arrival::Void(why) => eprintln!("ferry: machine `{name}` did not come: {why}"),
            }
        }
        ReceiveEvent::Waiting { name, missing: None, why } => eprintln!(
            "ferry: machine `{name}` runs at its source; the link was lost ({why}). What came is kept until it \
             comes back"
        ),
        ReceiveEvent::Waiting { name, missing: Some(missing), why } => eprintln!(
            "ferry: machine `{name}` runs here and lacks {missing} pages: the link to its source was lost ({why}). \
             Who touches one of them waits until the source comes back; if its process has ended, they are lost"
        ),
        ReceiveEvent::Turned(why) => eprintln!("ferry: {why}"),
    }
}

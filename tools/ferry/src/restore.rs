//! `ferry restore`: starts a machine from a bundle and hosts it.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Weak};
use std::time::Instant;

use ferry_bundle::Chain;
use ferry_migrate::{Fetching, Guest, Host, LazyEvent, Paging, RunPermit, restore, restore_lazily};
use ferry_process_guest::ProcessHost;
use ferry_refvmm::{Arrival, RefHost, SerialSink};
use indicatif::HumanCount;

use crate::Failure;
use crate::args::Restore;
use crate::hosted::Hosted;
use crate::machine::AnyMachine;
use crate::places;
use crate::runtime_dir::RuntimeDir;

/// A machine that can run.
struct Ready {
    machine: AnyMachine,
    permit: RunPermit,
    fetching: Option<Fetching>,
}

pub(crate) fn main(runtime: &RuntimeDir, args: &Restore) -> Result<(), Failure> {
    let began = Instant::now();
    let reservation = runtime.reserve(&args.name)?;
    let bundle = Arc::new(places::open(&args.dir, &args.places)?);
    let (tell, told) = channel();
    let ready = if bundle.spec().vmm == ferry_process_guest::VMM {
        let host = ProcessHost { huge_pages: args.huge_pages, ..ProcessHost::default() };
        from(&host, &bundle, args, tell, AnyMachine::process)?
    } else {
        let arrival = Arrival {
            name: Some(args.name.clone()),
            huge_pages: args.huge_pages,
            cpu: None,
            dirty_log: args.dirty_log.into(),
            serial: args.serial.clone().map_or(SerialSink::Stdout, SerialSink::File),
        };
        from(&RefHost { arrival }, &bundle, args, tell, AnyMachine::Kvm)?
    };
    // Its files are open for as long as they are needed: the directory may be saved over from now on.
    drop(bundle);
    let Ready { machine, permit, fetching } = ready;
    let hosted = Hosted::start(machine.clone(), reservation)?;
    let missing = fetching.as_ref().map(Fetching::missing);
    hosted.set_fetching(fetching);
    machine.clone().resume(permit).map_err(|(_permit, e)| Failure::from(e))?;
    let (spec, state) = (machine.spec(), machine.state());
    let lazily = missing.map_or_else(String::new, |missing| {
        let ms = began.elapsed().as_secs_f64() * 1e3;
        format!(", after {ms:.1} ms; it fetches {} pages", HumanCount(missing))
    });
    eprintln!(
        "ferry: machine `{}` restored from {}: {state} ({} MiB, {} vCPUs){lazily}",
        args.name,
        args.dir.display(),
        spec.memory_bytes() >> 20,
        spec.vcpus
    );
    let watched = Arc::downgrade(&hosted);
    std::thread::spawn(move || follow(&watched, &told));
    crate::vm::finish(&hosted.wait(), hosted.name())
}

fn from<H: Host>(
    host: &H,
    bundle: &Arc<Chain>,
    args: &Restore,
    tell: Sender<LazyEvent>,
    wrap: impl FnOnce(H::Guest) -> AnyMachine,
) -> Result<Ready, Failure> {
    let (restored, fetching) = if args.lazy {
        // Nobody hears it when the machine is gone.
        let tell = move |event| drop(tell.send(event));
        let (restored, fetching) = restore_lazily(host, bundle.clone(), &args.name, tell)?;
        (restored, Some(fetching))
    } else {
        (restore(host, bundle, &args.name, &mut |_| {})?, None)
    };
    Ok(Ready { machine: wrap(restored.guest), permit: restored.permit, fetching })
}

/// Says what becomes of the pages of a machine that was restored lazily.
fn follow(hosted: &Weak<Hosted>, told: &Receiver<LazyEvent>) {
    for event in told {
        let Some(hosted) = hosted.upgrade() else { return };
        let name = hosted.name();
        match event {
            LazyEvent::Complete(paging) => {
                hosted.set_fetching(None);
                eprintln!("ferry: machine `{name}`: {}", words(&paging));
            }
            LazyEvent::Damaged(why) => eprintln!(
                "ferry: machine `{name}` lacks pages that cannot be had: {why}. Whoever touches one of them \
                 waits for ever; the machine can only be stopped: `ferry vm stop {name}`"
            ),
        }
    }
}

fn words(paging: &Paging) -> String {
    let wait = &paging.wait_ms;
    format!(
        "all pages are here after {:.0} ms: {} came before they were touched, {} were waited for ({} faults): {:.2} \
         ms median, {:.2} p99, {:.2} longest; at 90 % of full speed after {:.0} ms",
        paging.took_ms,
        HumanCount(paging.pushed),
        HumanCount(paging.requested),
        HumanCount(paging.faults),
        wait.p50,
        wait.p99,
        wait.max,
        paging.full_speed_ms
    )
}

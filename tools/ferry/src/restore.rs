//! `ferry restore`: starts a machine from a bundle and hosts it.

use ferry_bundle::Chain;
use ferry_migrate::{Guest, Host, RunPermit, restore};
use ferry_process_guest::ProcessHost;
use ferry_refvmm::{Arrival, RefHost, SerialSink};

use crate::Failure;
use crate::args::Restore;
use crate::hosted::Hosted;
use crate::machine::AnyMachine;
use crate::runtime_dir::RuntimeDir;

pub(crate) fn main(runtime: &RuntimeDir, args: &Restore) -> Result<(), Failure> {
    let reservation = runtime.reserve(&args.name)?;
    let bundle = Chain::open(&args.dir, &args.bases)?;
    let (machine, permit) = if bundle.spec().vmm == ferry_process_guest::VMM {
        from(&ProcessHost::default(), &bundle, &args.name, AnyMachine::process)?
    } else {
        let arrival = Arrival {
            name: Some(args.name.clone()),
            dirty_log: args.dirty_log.into(),
            serial: args.serial.clone().map_or(SerialSink::Stdout, SerialSink::File),
        };
        from(&RefHost { arrival }, &bundle, &args.name, AnyMachine::Kvm)?
    };
    let hosted = Hosted::start(machine.clone(), reservation)?;
    machine.clone().resume(permit).map_err(|(_permit, e)| Failure::from(e))?;
    let (spec, state) = (machine.spec(), machine.state());
    eprintln!(
        "ferry: machine `{}` restored from {}: {state} ({} MiB, {} vCPUs)",
        args.name,
        args.dir.display(),
        spec.memory_bytes() >> 20,
        spec.vcpus
    );
    // Its files are open until here: the directory may be saved over from now on.
    drop(bundle);
    crate::vm::finish(&hosted.wait(), hosted.name())
}

fn from<H: Host>(
    host: &H,
    bundle: &Chain,
    name: &str,
    wrap: impl FnOnce(H::Guest) -> AnyMachine,
) -> Result<(AnyMachine, RunPermit), Failure> {
    let restored = restore(host, bundle, name, &mut |_| {})?;
    Ok((wrap(restored.guest), restored.permit))
}

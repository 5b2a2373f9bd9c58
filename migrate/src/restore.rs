//! Starting a machine from a bundle.

use std::io;

use ferry_bundle::{BundleError, Chain};
use ferry_memory::{Filler, MemoryError};
use ferry_protocol::{MachineSpec, Refusal, RunPermit, StateError, StateReader};

use crate::{Guest, GuestError, Host};

/// Why a machine was not restored. Nothing of it runs.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    /// The bundle cannot be read.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// This host cannot take the machine.
    #[error("this host cannot take the machine: {}", reasons(.0))]
    Refused(Vec<Refusal>),
    /// Its memory cannot be filled.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// Its memory cannot be filled while it runs.
    #[error("memory cannot be paged in on demand ({0}); restore it without --lazy")]
    NotLazy(#[source] MemoryError),
    /// The system gave no thread.
    #[error("cannot start a thread to bring pages: {0}")]
    Thread(#[source] io::Error),
    /// Pages that its state needs cannot be had.
    #[error("its state cannot be loaded: {0}")]
    Lost(String),
    /// Its state is not one.
    #[error(transparent)]
    State(#[from] StateError),
    /// Its state cannot be loaded here.
    #[error(transparent)]
    Guest(#[from] GuestError),
}

fn reasons(refusals: &[Refusal]) -> String {
    let all: Vec<_> = refusals.iter().map(|r| format!("{}: {}", r.what, r.why)).collect();
    all.join("; ")
}

/// A machine as it was saved, in front of its next instruction.
#[derive(Debug)]
pub struct Restored<G> {
    /// The machine, paused.
    pub guest: G,
    /// Its right to run: [`Guest::resume`] takes it.
    ///
    /// It is the permit of a *new* machine. A bundle holds none: it can be copied, and a permit cannot.
    /// Whoever restores a bundle while the machine that was saved still runs has made a clone, which
    /// nothing here can prevent, and which shares its network addresses and disks with it.
    pub permit: RunPermit,
    /// Pages of data: all were read, or are to come.
    pub pages: u64,
}

/// Makes the machine of `bundle` on `host`, under the name `name`. `watch` hears of pages filled.
///
/// # Errors
/// The host refuses it, or the bundle is damaged. Nothing is left of it then.
pub fn restore<H: Host>(
    host: &H,
    bundle: &Chain,
    name: &str,
    watch: &mut dyn FnMut(u64),
) -> Result<Restored<H::Guest>, RestoreError> {
    let (mut guest, state) = prepare(host, bundle, name)?;
    let mut pages = 0;
    let filler = Filler::new(guest.memory());
    bundle.visit(|run, bytes, _| -> Result<(), RestoreError> {
        filler.fill(run.start, bytes)?;
        pages += run.pages;
        watch(pages);
        Ok(())
    })?;
    drop(filler);
    guest.load(&state)?;
    Ok(Restored { guest, permit: permit(), pages })
}

/// An empty machine for `bundle`, and the state that it is to be given.
pub(crate) fn prepare<H: Host>(
    host: &H,
    bundle: &Chain,
    name: &str,
) -> Result<(H::Guest, StateReader), RestoreError> {
    let state = StateReader::parse(&bundle.state()?)?;
    let spec = MachineSpec { name: name.to_owned(), ..bundle.spec().clone() };
    Ok((host.prepare(&spec).map_err(RestoreError::Refused)?, state))
}

/// The right to run of what was restored.
pub(crate) fn permit() -> RunPermit {
    RunPermit::for_new_machine(rand::random())
}

//! What a migration, a save and a restore cost on this machine: figures measured in one run, side by side.
//!
//! Everything that is compared is run in turn, so that a busy machine is busy for both; figures are
//! medians, with the least and the most beside them. Both hosts live in this process (for `fetch` and `paths`: in two
//! network namespaces), and the link is QUIC unless said otherwise: one machine does the work of two.

mod balloon;
mod downtime;
mod fetch;
mod figures;
mod moves;
mod page_cost;
mod paths;
mod plain;
mod rate;
mod restore;
mod sharing;
mod swap;

use std::process::ExitCode;

use clap::{Parser, ValueEnum};
use ferry_migrate::SendOptions;

use crate::moves::Pki;

/// Whatever went wrong, in words.
type Failure = Box<dyn std::error::Error + Send + Sync>;

/// Measures what a migration, a save and a restore cost on this machine.
#[derive(Parser)]
struct Args {
    /// Measure each thing three times instead of seven.
    #[arg(long)]
    quick: bool,
    /// Measure each thing this many times.
    #[arg(long, conflicts_with = "quick", value_parser = clap::value_parser!(u32).range(1..))]
    repeats: Option<u32>,
    /// Connections for pages, for the plain copy as for the migration.
    #[arg(long, default_value_t = SendOptions::default().lanes)]
    lanes: u16,
    /// What to measure; everything if not said.
    #[arg(value_enum)]
    what: Vec<What>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum What {
    /// Rate of a migration beside that of a plain copy.
    Rate,
    /// QUIC beside TLS over TCP.
    Links,
    /// Two cables between the hosts, beside one.
    Paths,
    /// Cost of untouched and of zero pages.
    Pages,
    /// Downtime of an idle and of a busy guest.
    Downtime,
    /// How long vCPUs wait for pages in post-copy, over 1 Gbit/s.
    Fetch,
    /// Saving a running guest, and restoring it eagerly and lazily.
    Restore,
    /// A balloon that is inflated, beside a plain discard.
    Balloon,
    /// Finding equal pages and having the kernel merge them.
    Sharing,
    /// Pages that come back from the swap pool.
    Swap,
}

/// How to measure.
struct Plan {
    pki: Pki,
    repeats: u32,
    options: SendOptions,
    /// Whether there is KVM here.
    kvm: bool,
}

impl Plan {
    /// Lanes for the plain copy: as many as the engine has.
    fn lanes(&self) -> u16 {
        self.options.lanes
    }
}

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("{e}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<(), Failure> {
    let repeats = args.repeats.unwrap_or(if args.quick { 3 } else { 7 });
    let options = SendOptions { lanes: args.lanes, ..SendOptions::default() };
    let kvm = std::fs::File::options().read(true).write(true).open("/dev/kvm");
    let plan = Plan { pki: Pki::new()?, repeats, options, kvm: kvm.is_ok() };
    let cores = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    println!(
        "{cores} cores, {} connection(s) for pages, {repeats} runs of each, in turn: \
         median (least to most)",
        plan.lanes()
    );
    if let Err(e) = kvm {
        println!("no KVM guests: /dev/kvm: {e}");
    }
    let wanted = |what| args.what.is_empty() || args.what.contains(&what);
    if wanted(What::Rate) {
        rate::measure(&plan)?;
    }
    if wanted(What::Links) {
        rate::links(&plan)?;
    }
    if wanted(What::Paths) {
        paths::measure(&plan)?;
    }
    if wanted(What::Pages) {
        page_cost::measure(&plan)?;
    }
    if wanted(What::Downtime) {
        downtime::measure(&plan)?;
    }
    if wanted(What::Fetch) {
        fetch::measure(&plan)?;
    }
    if wanted(What::Restore) {
        restore::measure(&plan)?;
    }
    if wanted(What::Balloon) {
        balloon::measure(&plan)?;
    }
    if wanted(What::Sharing) {
        sharing::measure(&plan)?;
    }
    if wanted(What::Swap) {
        swap::measure(&plan)?;
    }
    Ok(())
}

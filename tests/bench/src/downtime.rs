//! How long a guest stands still while it moves.

use ferry_migrate::{DowntimeParts, Host, Report};
use ferry_process_guest::ProcessHost;
use ferry_refvmm::RefHost;

use crate::figures::Figures;
use crate::moves::{Destination, kvm, process};
use crate::{Failure, GIB, Plan};

const IDLE: &str = "pattern=idle arena=512M fill=all";
const BUSY: &str = "pattern=working-set set=32M arena=512M fill=all";

type Part = (&'static str, fn(&DowntimeParts) -> f64);
const PARTS: [Part; 6] = [
    ("pause", |p| p.pause),
    ("last harvest", |p| p.last_harvest),
    ("state", |p| p.state),
    ("last pages", |p| p.last_pages),
    ("flight", |p| p.flight),
    ("resume", |p| p.resume),
];

pub(crate) fn measure(plan: &Plan) -> Result<(), Failure> {
    println!("\nDowntime of a guest of 1 GiB with 512 MiB of data, ms (goal of the moves: 50)");
    for (what, workload) in [("idle", IDLE), ("rewriting 32 MiB as fast as it can", BUSY)] {
        let reports = moved(plan, ProcessHost::default(), process(GIB, workload)?)?;
        print("process guest", what, &reports);
        if plan.kvm {
            let reports = moved(plan, RefHost::default(), kvm(&plan.pki, GIB, workload)?)?;
            print("KVM guest", what, &reports);
        }
    }
    Ok(())
}

fn moved<H: Host + 'static>(
    plan: &Plan,
    host: H,
    mut guest: H::Guest,
) -> Result<Vec<Report>, Failure> {
    let destination = Destination::new(&plan.pki, host)?;
    let mut reports = Vec::new();
    for _ in 0..plan.repeats {
        let (report, _, arrived) = destination.take(guest, &plan.options)?;
        guest = arrived;
        reports.push(report);
    }
    Ok(reports)
}

fn print(kind: &str, what: &str, reports: &[Report]) {
    let of = |value: &dyn Fn(&Report) -> f64| Figures::new(reports.iter().map(value));
    println!("  {:<50} {:.1}", format!("{kind}, {what}"), of(&|r| r.downtime_ms));
    let parts: Vec<_> = PARTS
        .iter()
        .map(|(name, part)| format!("{name} {:.1}", of(&|r| part(&r.downtime_parts_ms)).median()))
        .collect();
    println!("    medians: {}", parts.join(", "));
    println!(
        "    rounds {:.0}, whole move {:.0} ms",
        of(&|r| f64::from(r.rounds)),
        of(&|r| r.total_ms)
    );
}

//! Rate of a migration, as a share of what a plain copy of as many bytes reaches.

use std::time::Duration;

use bytes::Bytes;
use ferry_migrate::{Guest, Host, Report};
use ferry_process_guest::ProcessHost;
use ferry_refvmm::RefHost;
use rand::Rng;

use crate::figures::{Cost, Figures};
use crate::moves::{Destination, kvm, process};
use crate::{Failure, GIB, MIB, Plan, plain};

const DATA_BYTES: u64 = 512 * MIB;
const GOAL: f64 = 0.7;
const WORKLOAD: &str = "pattern=idle arena=512M fill=all fill_random=100";

/// A guest that is moved over and over, and how fast it went.
struct Traveller<G> {
    destination: Destination<G>,
    guest: Option<G>,
    moves: Vec<(Report, Cost)>,
}

impl<G: Guest + 'static> Traveller<G> {
    fn new<H: Host<Guest = G> + 'static>(plan: &Plan, host: H, guest: G) -> Result<Self, Failure> {
        let destination = Destination::new(&plan.pki, host)?;
        Ok(Self { destination, guest: Some(guest), moves: Vec::new() })
    }

    /// Moves once; the first time, which finds everything cold, does not count.
    fn step(&mut self, plan: &Plan, counts: bool) -> Result<(), Failure> {
        let guest = self.guest.take().ok_or("the guest was lost")?;
        let (report, cpu, guest) = self.destination.take(guest, &plan.options)?;
        self.guest = Some(guest);
        if counts {
            let took = Duration::from_secs_f64(report.total_ms / 1e3);
            self.moves.push((report, Cost { took, cpu }));
        }
        Ok(())
    }

    fn print(&self, what: &str, plain: &[Cost]) {
        let rates = Figures::new(self.moves.iter().map(|(_, cost)| gbit(cost)));
        let pairs = || self.moves.iter().map(|(_, cost)| cost).zip(plain);
        let shares = Figures::new(pairs().map(|(cost, plain)| gbit(cost) / gbit(plain)));
        let cpu = Figures::new(pairs().map(|(cost, plain)| cost.cpu.div_duration_f64(plain.cpu)));
        let verdict = if shares.median() >= GOAL { "met" } else { "MISSED" };
        println!("  {what:<22} {rates:.2} Gbit/s: {shares:.2} of the plain copy: {verdict}");
        let verify = Figures::new(self.moves.iter().map(|(report, _)| report.verify_ms));
        println!(
            "  {:<22} {cpu:.2} of its CPU time; digests compared in another {verify:.0} ms",
            ""
        );
    }
}

fn gbit(cost: &Cost) -> f64 {
    DATA_BYTES as f64 * 8.0 / cost.took.as_secs_f64() / 1e9
}

pub(crate) fn measure(plan: &Plan) -> Result<(), Failure> {
    let mut bytes = vec![0; usize::try_from(DATA_BYTES)?];
    rand::rng().fill_bytes(&mut bytes);
    let bytes = Bytes::from(bytes);
    let guest = process(GIB, WORKLOAD)?;
    let mut processes = Traveller::new(plan, ProcessHost::default(), guest)?;
    let mut machines = match plan.kvm {
        true => Some(Traveller::new(plan, RefHost::default(), kvm(&plan.pki, GIB, WORKLOAD)?)?),
        false => None,
    };
    let mut plains = Vec::new();
    for turn in 0..=plan.repeats {
        let plain = plain::copy(&plan.pki, &bytes, plan.lanes())?;
        if turn > 0 {
            plains.push(plain);
        }
        processes.step(plan, turn > 0)?;
        if let Some(machines) = &mut machines {
            machines.step(plan, turn > 0)?;
        }
    }
    let goal = GOAL * 100.0;
    println!("\nAn idle guest of 1 GiB, 512 MiB of it incompressible data (goal: {goal:.0} %)");
    let rates = Figures::new(plains.iter().map(gbit));
    println!("  {:<22} {rates:.2} Gbit/s", "plain copy of 512 MiB");
    processes.print("process guest", &plains);
    if let Some(machines) = &machines {
        machines.print("KVM guest", &plains);
    }
    Ok(())
}

//! Rate of a migration, as a share of what a plain copy of as many bytes reaches.

use bytes::Bytes;
use ferry_migrate::{Guest, Host, Report};
use ferry_process_guest::ProcessHost;
use ferry_refvmm::RefHost;
use rand::Rng;

use crate::figures::Figures;
use crate::moves::{Destination, kvm, process};
use crate::{Failure, GIB, MIB, Plan, plain};

const DATA_BYTES: u64 = 512 * MIB;
const GOAL: f64 = 0.7;
const WORKLOAD: &str = "pattern=idle arena=512M fill=all fill_random=100";

/// A guest that is moved over and over, and how fast it went.
struct Traveller<G> {
    destination: Destination<G>,
    guest: Option<G>,
    reports: Vec<Report>,
}

impl<G: Guest + 'static> Traveller<G> {
    fn new<H: Host<Guest = G> + 'static>(plan: &Plan, host: H, guest: G) -> Result<Self, Failure> {
        let destination = Destination::new(&plan.pki, host)?;
        Ok(Self { destination, guest: Some(guest), reports: Vec::new() })
    }

    /// Moves once; the first time, which finds everything cold, does not count.
    fn step(&mut self, plan: &Plan, counts: bool) -> Result<(), Failure> {
        let guest = self.guest.take().ok_or("the guest was lost")?;
        let (report, guest) = self.destination.take(guest, &plan.options)?;
        self.guest = Some(guest);
        if counts {
            self.reports.push(report);
        }
        Ok(())
    }

    fn print(&self, what: &str, plain_rates: &[f64]) {
        let rate = |r: &Report| DATA_BYTES as f64 / (r.total_ms / 1e3);
        let rates = Figures::new(self.reports.iter().map(|r| gbit(rate(r))));
        let shares =
            Figures::new(self.reports.iter().zip(plain_rates).map(|(r, plain)| rate(r) / plain));
        let verify = Figures::new(self.reports.iter().map(|r| r.verify_ms));
        let raw = self.reports.iter().map(|r| r.pages.raw).sum::<u64>();
        let all =
            self.reports.iter().map(|r| r.pages.raw + r.pages.lz4 + r.pages.zstd).sum::<u64>();
        let verdict = if shares.median() >= GOAL { "met" } else { "MISSED" };
        println!("  {what:<26} {rates:.2} Gbit/s, {shares:.3} of the plain copy: {verdict}");
        println!(
            "  {:<26} {:.1} % of pages raw; comparing the digests afterwards {verify:.0} ms",
            "",
            raw as f64 * 100.0 / all as f64
        );
    }
}

fn gbit(bytes_per_s: f64) -> f64 {
    bytes_per_s * 8.0 / 1e9
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
    let mut plain_rates = Vec::new();
    for turn in 0..=plan.repeats {
        let rate = plain::copy(&plan.pki, &bytes, plan.lanes())?;
        if turn > 0 {
            plain_rates.push(rate);
        }
        processes.step(plan, turn > 0)?;
        if let Some(machines) = &mut machines {
            machines.step(plan, turn > 0)?;
        }
    }
    let goal = GOAL * 100.0;
    println!("\nAn idle guest of 1 GiB, 512 MiB of it incompressible data (goal: {goal:.0} %)");
    let rates = Figures::new(plain_rates.iter().map(|rate| gbit(*rate)));
    println!("  {:<26} {rates:.2} Gbit/s", "plain copy of 512 MiB");
    processes.print("process guest", &plain_rates);
    if let Some(machines) = &machines {
        machines.print("KVM guest", &plain_rates);
    }
    Ok(())
}

//! Rate of a migration, as a share of what a plain copy of as many bytes reaches.

use std::time::Duration;

use bytes::Bytes;
use ferry_e2e::network;
use ferry_migrate::{Guest, Host, Report};
use ferry_process_guest::ProcessHost;
use ferry_refvmm::RefHost;
use ferry_transport::{LinkChoice, Over};
use rand::Rng;
use serde_json::Value;

use crate::fetch::hosts_over;
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

    fn print(&self, what: &str, yardsticks: &[Yardstick]) {
        let rates = Figures::new(self.moves.iter().map(|(_, cost)| gbit(cost)));
        let verify = Figures::new(self.moves.iter().map(|(report, _)| report.verify_ms));
        println!("  {what}: {rates:.2} Gbit/s; digests compared in another {verify:.0} ms");
        for (i, yardstick) in yardsticks.iter().enumerate() {
            let pairs = || self.moves.iter().map(|(_, cost)| cost).zip(&yardstick.costs);
            let shares = Figures::new(pairs().map(|(cost, plain)| gbit(cost) / gbit(plain)));
            let cpu =
                Figures::new(pairs().map(|(cost, plain)| cost.cpu.div_duration_f64(plain.cpu)));
            let verdict = match shares.median() >= GOAL {
                _ if i > 1 => "",
                true => ": met",
                false => ": MISSED",
            };
            println!("    {shares:.2} of the {}{verdict}", yardstick.name);
            println!("      at {cpu:.2} times its CPU time");
        }
    }
}

/// A plain copy to compare with.
struct Yardstick {
    name: &'static str,
    connections: u16,
    keep: bool,
    costs: Vec<Cost>,
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
    let yardstick = |name, connections, keep| {
        let costs = Vec::new();
        Yardstick { name, connections, keep, costs }
    };
    // The first two are judged. A copy is not one before it lies in memory, and on two cores that both ends
    // share, making 512 MiB of fresh memory costs as much as bringing the bytes there: the second, which
    // drops them, is the harder one.
    let mut yardsticks = vec![
        yardstick("plain copy", plan.lanes(), true),
        yardstick("plain copy, dropped where it arrives", plan.lanes(), false),
    ];
    if plan.lanes() > 1 {
        yardsticks.push(yardstick("plain copy over one connection, dropped", 1, false));
    }
    for turn in 0..=plan.repeats {
        for y in &mut yardsticks {
            let copied = plain::copy(&plan.pki, Over::Quic, &bytes, y.connections, y.keep)?;
            let cost = copied.cost;
            if turn > 0 {
                y.costs.push(cost);
            }
        }
        processes.step(plan, turn > 0)?;
        if let Some(machines) = &mut machines {
            machines.step(plan, turn > 0)?;
        }
    }
    let goal = GOAL * 100.0;
    println!("\nAn idle guest of 1 GiB, 512 MiB of it incompressible data (goal: {goal:.0} %)");
    for y in &yardsticks {
        println!("  {}: {:.2} Gbit/s", y.name, Figures::new(y.costs.iter().map(gbit)));
    }
    processes.print("process guest", &yardsticks);
    if let Some(machines) = &machines {
        machines.print("KVM guest", &yardsticks);
    }
    Ok(())
}

/// QUIC beside TLS over TCP: plain copies and whole moves, with what they cost each end.
pub(crate) fn links(plan: &Plan) -> Result<(), Failure> {
    const LINKS: [Over; 2] = [Over::Quic, Over::Tls];
    let mut bytes = vec![0; usize::try_from(DATA_BYTES)?];
    rand::rng().fill_bytes(&mut bytes);
    let bytes = Bytes::from(bytes);
    println!("\nQUIC and TLS over TCP, 512 MiB that no codec makes smaller, over loopback");
    for connections in [1, 2] {
        let mut copies = LINKS.map(|link| (link, Vec::new()));
        for turn in 0..=plan.repeats {
            for (link, copied) in &mut copies {
                let copy = plain::copy(&plan.pki, *link, &bytes, connections, false)?;
                if turn > 0 {
                    copied.push(copy);
                }
            }
        }
        println!("  plain copy, {connections} connection(s)");
        for (link, copied) in &copies {
            let per_gib = |cpu: Duration| cpu.as_secs_f64() * GIB as f64 / DATA_BYTES as f64;
            let rate = Figures::new(copied.iter().map(|c| gbit(&c.cost)));
            let source = Figures::new(copied.iter().map(|c| per_gib(c.source_cpu)));
            let destination = |c: &plain::Copied| per_gib(c.cost.cpu.saturating_sub(c.source_cpu));
            let destination = Figures::new(copied.iter().map(destination));
            println!(
                "    {link}: {rate:.2} Gbit/s; CPU seconds a GiB: source {source:.2}, destination {destination:.2}"
            );
        }
        let [(_, quic), (_, tls)] = &copies;
        let pairs = || quic.iter().zip(tls).map(|(quic, tls)| (&quic.cost, &tls.cost));
        let faster = Figures::new(pairs().map(|(quic, tls)| gbit(tls) / gbit(quic)));
        let cheaper = Figures::new(pairs().map(|(quic, tls)| tls.cpu.div_duration_f64(quic.cpu)));
        println!("    TLS has {faster:.2} of QUIC's rate at {cheaper:.2} of its CPU time");
    }
    let travellers: Result<Vec<_>, Failure> = LINKS
        .iter()
        .map(|link| {
            let destination =
                Destination::on(&plan.pki, ProcessHost::default(), LinkChoice::Only(*link))?;
            let guest = Some(process(GIB, WORKLOAD)?);
            Ok(Traveller { destination, guest, moves: Vec::new() })
        })
        .collect();
    let mut travellers = travellers?;
    for turn in 0..=plan.repeats {
        for traveller in &mut travellers {
            traveller.step(plan, turn > 0)?;
        }
    }
    println!("  a process guest of 1 GiB, half of it data, over {} lane(s)", plan.lanes());
    let mut all = travellers.iter().map(|traveller| &traveller.moves);
    for (link, moves) in LINKS.iter().zip(all.clone()) {
        let rate = Figures::new(moves.iter().map(|(_, cost)| gbit(cost)));
        let cpu = Figures::new(moves.iter().map(|(_, cost)| cost.cpu.as_secs_f64()));
        let downtime = Figures::new(moves.iter().map(|(report, _)| report.downtime_ms));
        println!(
            "    {link}: {rate:.2} Gbit/s; {cpu:.2} CPU seconds at both ends; {downtime:.2} ms downtime"
        );
    }
    if let (Some(quic), Some(tls)) = (all.next(), all.next()) {
        let pairs = || quic.iter().zip(tls).map(|((_, quic), (_, tls))| (quic, tls));
        let faster = Figures::new(pairs().map(|(quic, tls)| gbit(tls) / gbit(quic)));
        let cheaper = Figures::new(pairs().map(|(quic, tls)| tls.cpu.div_duration_f64(quic.cpu)));
        println!("    TLS has {faster:.2} of QUIC's rate at {cheaper:.2} of its CPU time");
    }
    shaped(plan, LINKS)
}

/// Whole moves by the command between two network namespaces.
fn shaped(plan: &Plan, links: [Over; 2]) -> Result<(), Failure> {
    const RATE: &str = "1gbit";
    const HALF: &str =
        "pattern=working-set set=1M rate=500 arena=256M fill=all fill_random=100 random=100";
    println!("  256 MiB that no codec makes smaller, by the command, over {RATE}");
    let Some((_network, hosts)) = hosts_over(RATE) else { return Ok(()) };
    for mode in ["pre-copy", "post-copy"] {
        let mut moves = links.map(|_| Vec::new());
        for _ in 0..plan.repeats {
            for (link, moves) in links.iter().zip(&mut moves) {
                let boot = ["--memory", "512M", "--cmdline", HALF];
                let runner = hosts.source.boot("m", ":process", &boot);
                let listen = format!("{}:0", network::ADDRESSES[1]);
                let (receiver, to) = hosts.destination.receive_on(&listen, &["--once"]);
                let only = LinkChoice::Only(*link).to_string();
                let moved = hosts.source.migrate("m", to, &["--mode", mode, "--link", &only]);
                if moved.status != Some(0) {
                    return Err(format!("a move failed: {:#}", moved.report).into());
                }
                hosts.destination.run(&["vm", "stop", "m"]);
                drop((runner, receiver));
                moves.push(moved.report);
            }
        }
        for (link, moves) in links.iter().zip(&moves) {
            let of = |figure: fn(&Value) -> &Value| {
                Figures::new(moves.iter().map(|r| figure(r).as_f64().unwrap_or(f64::NAN)))
            };
            let (total, down) = (of(|r| &r["total_ms"]), of(|r| &r["downtime_ms"]));
            let fetching = of(|r| &r["paging"]["took_ms"]);
            println!(
                "    {mode}, {link}: {total:.0} ms in all, {down:.2} ms downtime, fetching {fetching:.0} ms"
            );
        }
    }
    Ok(())
}

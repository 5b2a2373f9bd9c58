//! A machine that goes by two cables, beside one that goes by one of them.

use ferry_e2e::{Hosts, network};

use crate::figures::Figures;
use crate::{Failure, Plan};

/// So little that the CPU does not limit it.
const RATE: &str = "200mbit";
const NOISE: &str =
    "pattern=working-set set=1M rate=200 arena=96M fill=all fill_random=100 random=100";

pub(crate) fn measure(plan: &Plan) -> Result<(), Failure> {
    println!(
        "\nPre-copy of 96 MiB that no codec makes smaller, over one cable of {RATE} and over two"
    );
    let Some(network) = network::Network::of_two_cables() else { return Ok(()) };
    for cable in ["cable", "cable2"] {
        if let Some(why) = network.shape_cable(cable, RATE) {
            println!("  SKIP: no such link can be made: {why}");
            return Ok(());
        }
    }
    let mut hosts = Hosts::new();
    (hosts.source.before, hosts.destination.before) = (network.at(0), network.at(1));
    let [first, second] = [network::ADDRESSES[1], network::SECOND[1]];
    let (mut one, mut two) = (Vec::new(), Vec::new());
    for _ in 0..plan.repeats {
        for (addresses, totals) in [(vec![first], &mut one), (vec![first, second], &mut two)] {
            let runner =
                hosts.source.boot("m", ":process", &["--memory", "128M", "--cmdline", NOISE]);
            let (receiver, listens) = hosts.destination.receive_on("0.0.0.0:0", &["--once"]);
            let to: Vec<_> = addresses.iter().map(|a| format!("{a}:{}", listens.port())).collect();
            let moved = hosts.source.migrate("m", to.join(","), &["--mode", "pre-copy"]);
            if moved.status != Some(0) {
                return Err(format!("a move failed: {:#}", moved.report).into());
            }
            hosts.destination.run(&["vm", "stop", "m"]);
            drop((runner, receiver));
            totals.push(moved.report["total_ms"].as_f64().unwrap_or(f64::NAN));
        }
    }
    let faster = Figures::new(one.iter().zip(&two).map(|(one, two)| one / two));
    let (one, two) = (Figures::new(one), Figures::new(two));
    println!(
        "  one: {one:.0} ms, two: {two:.0} ms in all; by two it takes one part in {faster:.2}"
    );
    Ok(())
}

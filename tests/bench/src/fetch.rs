//! How long vCPUs wait for pages after a post-copy hand-over, between two network namespaces.

use ferry_e2e::{Hosts, network};
use serde_json::Value;

use crate::figures::Figures;
use crate::{Failure, Plan};

const RATE: &str = "1gbit";
/// Every page of 480 MiB is come to, in no order, as fast as one vCPU can.
const WORKLOADS: [(&str, &str); 2] = [
    ("a quarter random", "pattern=random arena=480M fill=all fill_random=25 random=25"),
    ("all random", "pattern=random arena=480M fill=all fill_random=100 random=100"),
];
type Figure = (&'static str, fn(&Value) -> f64);
/// What is printed of each move: how, and where it is in the report.
const FIGURES: [Figure; 7] = [
    ("wait, mean, ms", |r| number(&r["paging"]["wait_ms"]["mean"])),
    ("wait, median, ms", |r| number(&r["paging"]["wait_ms"]["p50"])),
    ("wait, p99, ms", |r| number(&r["paging"]["wait_ms"]["p99"])),
    ("pages waited for", |r| number(&r["paging"]["requested"])),
    ("there before they were touched, %", |r| {
        let [pushed, requested] = ["pushed", "requested"].map(|key| number(&r["paging"][key]));
        100.0 * pushed / (pushed + requested)
    }),
    ("all pages there after, s", |r| number(&r["paging"]["took_ms"]) / 1e3),
    ("downtime, ms", |r| number(&r["downtime_ms"])),
];

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(f64::NAN)
}

/// Two hosts in network namespaces, and the cable of `rate` between them; none, with a word why, where there can be no
/// such thing.
pub(crate) fn hosts_over(rate: &str) -> Option<(network::Network, Hosts)> {
    let network = network::Network::new()?;
    if let Some(why) = network.shape(rate) {
        println!("  SKIP: no such link can be made: {why}");
        return None;
    }
    let mut hosts = Hosts::new();
    (hosts.source.before, hosts.destination.before) = (network.at(0), network.at(1));
    Some((network, hosts))
}

pub(crate) fn measure(plan: &Plan) -> Result<(), Failure> {
    println!("\nPost-copy of 512 MiB over {RATE}, 480 MiB of it come to at random");
    let Some((_network, hosts)) = hosts_over(RATE) else { return Ok(()) };
    let guests: &[(&str, &str)] = match plan.kvm {
        true => &[("process guest", ":process"), ("KVM guest", ":guest")],
        false => &[("process guest", ":process")],
    };
    for (content, workload) in WORKLOADS {
        for (what, kernel) in guests {
            let mut reports = Vec::new();
            for _ in 0..plan.repeats {
                let boot = ["--memory", "512M", "--cmdline", workload];
                let runner = hosts.source.boot("m", kernel, &boot);
                let listen = format!("{}:0", network::ADDRESSES[1]);
                let (receiver, to) = hosts.destination.receive_on(&listen, &["--once"]);
                let moved = hosts.source.migrate("m", to, &["--mode", "post-copy"]);
                if moved.status != Some(0) {
                    return Err(format!("a move failed: {:#}", moved.report).into());
                }
                hosts.destination.run(&["vm", "stop", "m"]);
                drop((runner, receiver));
                reports.push(moved.report);
            }
            println!("  {what}, {content}");
            for (name, figure) in FIGURES {
                println!("    {name:<34} {:.2}", Figures::new(reports.iter().map(figure)));
            }
        }
    }
    Ok(())
}

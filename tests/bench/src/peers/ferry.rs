//! Ferry as the VMM of a guest: the command as its users have it.

use std::net::SocketAddr;
use std::time::Duration;

use ferry_e2e::{Hosts, Moved, Running};

use crate::Failure;
use crate::cases::{Case, Kind};
use crate::measure::{Ended, Whole};
use crate::trace::End;
use crate::watch::{Process, Watch};
use crate::wire::Wire;

/// A process that hosts the guest, or has room for it.
pub(crate) struct Ferry(Running);

impl Ferry {
    /// Boots the guest of `case`; back when it follows its pattern.
    pub(crate) fn boot(hosts: &Hosts, case: &Case) -> Result<Self, Failure> {
        let memory = format!("{}M", case.memory_mib);
        let args = [
            "vm",
            "run",
            "m",
            "--kernel",
            ":guest",
            "--memory",
            &memory,
            "--cmdline",
            case.workload,
        ];
        let mut running = hosts.source.start(&args);
        if !running.is_alive() {
            return Err(format!("ferry does not boot: {}", running.end().stderr).into());
        }
        crate::measure::wait_until_it_works(running.id(), case)?;
        Ok(Self(running))
    }

    pub(crate) fn pid(&self) -> u32 {
        self.0.id()
    }

    /// The guest's place at the other end, and its address.
    pub(crate) fn prepare(hosts: &Hosts, wire: &Wire) -> (Self, SocketAddr) {
        let listen = format!("{}:0", wire.address(1));
        // Its default: what the kernel can, not `strict`.
        let more = ["--once", "--sandbox", "auto"];
        let (running, to) = hosts.destination.receive_on(&listen, &more);
        (Self(running), to)
    }

    /// Moves the guest to who waits at `to`.
    pub(crate) fn migrate(
        hosts: &Hosts,
        to: SocketAddr,
        case: &Case,
        watch: &Watch,
        most: Duration,
    ) -> Result<Ended, Failure> {
        let mode: &[&str] =
            if case.kind == Kind::PostCopy { &["--mode", "post-copy"] } else { &[] };
        let began = watch.now();
        let mut moving = hosts.source.start_migrate("m", to, &[&["--json"], mode].concat());
        watch.add(Process { pid: moving.id(), end: None });
        while moving.is_alive() {
            if watch.now().saturating_sub(began) > most {
                return Err(format!("not within {} s", most.as_secs()).into());
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let Moved { status, report } = moving.end().into();
        if status != Some(0) {
            return Err(format!("exit status {status:?}: {}", report["reason"]).into());
        }
        watch.wait(
            "the guest runs at the destination",
            Duration::from_secs(10),
            Watch::runs_there,
        )?;
        let number = |value: &serde_json::Value| value.as_f64().unwrap_or(f64::NAN);
        let fetched = &report["paging"]["took_ms"];
        let whole = match fetched.as_f64() {
            Some(ms) => Whole::After(Duration::from_secs_f64(ms.max(0.0) / 1e3)),
            None => Whole::AtHandOver,
        };
        // By the way that was asked for.
        let first = &report["foreseen"]["ways"][0];
        Ok(Ended {
            began,
            whole,
            downtime_said_ms: number(&report["downtime_ms"]),
            foretold_ms: first["total_ms"]
                .as_f64()
                .map(|total| total + first["fetching_ms"].as_f64().unwrap_or(0.0)),
            how: format!(
                "{}, {} rounds, parts {}, waits {}, {} ms by its own clock",
                report["mode"],
                report["rounds"],
                report["downtime_parts_ms"],
                report["paging"]["wait_ms"],
                report["total_ms"]
            ),
        })
    }

    /// The two that take part.
    pub(crate) fn processes(&self, there: &Self) -> [Process; 2] {
        [(self, End::Source), (there, End::Destination)]
            .map(|(ferry, end)| Process { pid: ferry.pid(), end: Some(end) })
    }
}

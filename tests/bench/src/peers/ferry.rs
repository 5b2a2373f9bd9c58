//! Ferry as the VMM of a guest: the command as its users have it.

use std::net::SocketAddr;
use std::time::Duration;

use ferry_e2e::{Host, Hosts, Moved, Running};

use crate::Failure;
use crate::cases::{Case, Kind};
use crate::measure::{Ended, Whole};
use crate::trace::End;
use crate::watch::{Process, Watch};
use crate::wire::Wire;

/// A process that hosts the guest, or has room for it.
pub(crate) struct Ferry {
    running: Running,
    end: usize,
}

fn host<'a>(hosts: &'a Hosts, end: usize) -> &'a Host {
    if end == 0 { &hosts.source } else { &hosts.destination }
}

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
        let mut running = host(hosts, 0).start(&args);
        if !running.is_alive() {
            return Err(format!("ferry does not boot: {}", running.end().stderr).into());
        }
        crate::measure::wait_until_it_works(running.id(), case)?;
        Ok(Self { running, end: 0 })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.running.id()
    }

    /// The guest's place at the other end, and its address.
    pub(crate) fn prepare(&self, hosts: &Hosts, wire: &Wire) -> (Self, SocketAddr) {
        let end = 1 - self.end;
        let listen = format!("{}:0", wire.address(end));
        // Its default: what the kernel can, not `strict`.
        let more = ["--once", "--sandbox", "auto"];
        let (running, to) = host(hosts, end).receive_on(&listen, &more);
        (Self { running, end }, to)
    }

    /// Moves the guest to who waits at `to`.
    pub(crate) fn migrate(
        &self,
        hosts: &Hosts,
        to: SocketAddr,
        case: &Case,
        watch: &Watch,
    ) -> Result<Ended, Failure> {
        let mode: &[&str] =
            if case.kind == Kind::PostCopy { &["--mode", "post-copy"] } else { &[] };
        let began = watch.now();
        let moving = host(hosts, self.end).start_migrate("m", to, &[&["--json"], mode].concat());
        watch.add(Process { pid: moving.id(), end: None });
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
        Ok(Ended {
            began,
            whole,
            downtime_said_ms: number(&report["downtime_ms"]),
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

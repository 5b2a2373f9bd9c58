//! `ferry pager`: serves the memory of a Firecracker snapshot.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::OnceLock;
use std::time::Duration;

use ferry_firecracker::{Door, Ended, Memory, Report};
use indicatif::{HumanBytes, HumanCount};
use rustix::event::{EventfdFlags, eventfd};
use serde::Serialize;

use crate::Failure;
use crate::args::Pager;
use crate::places;

/// What a signal rings.
static STOP: OnceLock<OwnedFd> = OnceLock::new();

/// What `--json` prints. All pages are of `page_bytes`.
#[derive(Serialize)]
struct Served {
    /// `whole`: the machine goes on alone; `machine_ended`; `stopped`: none came before the pager was asked
    /// to stop.
    ended: &'static str,
    page_bytes: u64,
    faults: u64,
    zero_faults: u64,
    pages_ahead: u64,
    pages_given_back: u64,
    pages_left: u64,
    waits: u64,
    wait_median_us: u128,
    wait_p99_us: u128,
    wait_longest_us: u128,
}

pub(crate) fn main(args: &Pager) -> Result<(), Failure> {
    let memory = match (&args.memory, &args.bundle) {
        (Some(file), _) => Memory::of_file(file)?,
        (None, Some(dir)) => Memory::of_chain(places::open(dir, &args.places)?)?,
        (None, None) => return Err(Failure::words("say --memory or --bundle")),
    };
    let bell = eventfd(0, EventfdFlags::CLOEXEC).map_err(std::io::Error::from)?;
    let stop = STOP.get_or_init(|| bell);
    for signal in [libc::SIGTERM, libc::SIGINT] {
        vmm_sys_util::signal::register_signal_handler(signal, ring)?;
    }
    let door = Door::open(&args.socket)?;
    eprintln!(
        "ferry: waiting at {} with {}: {}, {} pages of data",
        args.socket.display(),
        memory.name(),
        HumanBytes(memory.bytes()),
        HumanCount(memory.data_pages())
    );
    let report = door.serve(&memory, !args.on_demand, stop.as_fd())?;
    if args.json {
        println!("{}", serde_json::to_string_pretty(&served(report))?);
    } else {
        println!("{}", report.map_or_else(|| "stopped before a machine came".into(), words));
    }
    Ok(())
}

extern "C" fn ring(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    if let Some(stop) = STOP.get() {
        // An eventfd takes eight bytes, and its counter is far from full.
        let _ = rustix::io::write(stop, &1u64.to_ne_bytes());
    }
}

fn served(report: Option<Report>) -> Served {
    let ended = match report.map(|report| report.ended) {
        Some(Ended::Whole) => "whole",
        Some(Ended::Machine) => "machine_ended",
        None => "stopped",
    };
    let of = |count: fn(&Report) -> u64| report.as_ref().map_or(0, count);
    let us = |wait: fn(&Report) -> Duration| report.as_ref().map_or(0, |r| wait(r).as_micros());
    Served {
        ended,
        page_bytes: of(|r| r.page_bytes),
        faults: of(|r| r.faults),
        zero_faults: of(|r| r.zeros),
        pages_ahead: of(|r| r.ahead),
        pages_given_back: of(|r| r.given_back),
        pages_left: of(|r| r.left),
        waits: of(|r| r.waits.count),
        wait_median_us: us(|r| r.waits.median),
        wait_p99_us: us(|r| r.waits.p99),
        wait_longest_us: us(|r| r.waits.longest),
    }
}

fn words(report: Report) -> String {
    let ended = match report.ended {
        Ended::Whole => "all memory is loaded; the machine goes on without the pager",
        Ended::Machine => "the machine has ended",
    };
    let us = |wait: Duration| wait.as_micros();
    format!(
        "{ended}\n  faults  {}, {} of them of zeros\n  waits   {} for pages of data: median {}, p99 {}, longest {} us\n  pages   {} loaded ahead, {} given back before they came, {} not loaded",
        HumanCount(report.faults),
        HumanCount(report.zeros),
        HumanCount(report.waits.count),
        us(report.waits.median),
        us(report.waits.p99),
        us(report.waits.longest),
        HumanCount(report.ahead),
        HumanCount(report.given_back),
        HumanCount(report.left),
    )
}

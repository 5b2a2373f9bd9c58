//! One move, measured from outside.

use std::time::Duration;

use ferry_guest::status::State;

use crate::Failure;
use crate::cases::Case;
use crate::record::{Figures, Waits};
use crate::trace::{self, End};
use crate::watch::{OFTEN, Process, SELDOM, Watch, guest_resident_bytes};
use crate::wire::Wire;

/// How long a guest is looked at before its move: its full speed is measured then.
const BEFORE: Duration = Duration::from_secs(1);
/// A visit that takes longer waited for a page from the other host. One that only waits for this host to map a
/// page that is here takes less.
const WAIT_US: u64 = 50;
const MIB: f64 = (1 << 20) as f64;

/// When all of a guest's memory was at the destination.
pub(crate) enum Whole {
    /// Before it ran there.
    AtHandOver,
    /// Then, from the watch's first look.
    At(Duration),
    /// So long after it ran there.
    After(Duration),
}

/// A move that ended well, as the VMM tells it.
pub(crate) struct Ended {
    /// When it was asked for, from the watch's first look.
    pub(crate) began: Duration,
    pub(crate) whole: Whole,
    pub(crate) downtime_said_ms: f64,
    pub(crate) foretold_ms: Option<f64>,
    pub(crate) how: String,
}

/// Waits until the guest of a process follows its pattern.
pub(crate) fn wait_until_it_works(pid: u32, case: &Case) -> Result<(), Failure> {
    let watch =
        Watch::new(case.memory_mib << 20, &[Process { pid, end: Some(End::Source) }], SELDOM);
    let over = |watch: &Watch| {
        let maps = std::fs::read(format!("/proc/{pid}/maps")).unwrap_or_default();
        let stopped = [State::Corrupt, State::BadParams, State::Fault].map(Some);
        maps.is_empty() || stopped.contains(&watch.state()) || watch.state() == Some(State::Running)
    };
    watch.wait("the guest fills its memory", Duration::from_secs(300), over)?;
    match watch.state() {
        Some(State::Running) => Ok(()),
        state => Err(format!("the guest of process {pid} does not work: {state:?}").into()),
    }
}

/// Looks at a guest while `moving` moves it.
pub(crate) fn measure(
    case: &Case,
    wire: &Wire,
    processes: [Process; 2],
    tsc_khz: u32,
    moving: impl FnOnce(&Watch) -> Result<Ended, Failure>,
) -> Result<Figures, Failure> {
    let memory_bytes = case.memory_mib << 20;
    let guest = |pid| guest_resident_bytes(pid, memory_bytes).unwrap_or(0);
    let guest_before = guest(processes[0].pid);
    let watch = Watch::new(memory_bytes, &processes, OFTEN);
    std::thread::sleep(BEFORE);
    watch.forget_peaks();
    let (cpu_before, bytes_before) = (watch.usage().cpu, wire.bytes()?);
    let ended = moving(&watch)?;
    let bytes = wire.bytes()? - bytes_before;
    let stalls = watch.stalls_there();
    let waits = stalls.map(|s| s.of_at_least(WAIT_US * u64::from(tsc_khz) / 1000));
    // A process that has handed over ends by itself; its last moments are a part of the price.
    std::thread::sleep(Duration::from_millis(100));
    let used = watch.usage();
    let looks = watch.looks();
    if watch.state() != Some(State::Running) {
        return Err(format!("the guest is not well after its move: {:?}", watch.state()).into());
    }
    let seen = trace::seen(&looks, ended.began).ok_or("the guest was not seen at both hosts")?;
    let whole = match ended.whole {
        Whole::AtHandOver => seen.runs_there,
        Whole::At(then) => then.max(seen.runs_there),
        Whole::After(fetching) => seen.runs_there + fetching,
    };
    let speed = |from, to| trace::speed(&looks, from, to).ok_or("no looks");
    let full = speed(ended.began.saturating_sub(BEFORE), ended.began)?;
    let guests = [(processes[0].pid, guest_before), (processes[1].pid, guest(processes[1].pid))];
    let beyond = used.peak_bytes.iter().map(|(pid, peak)| {
        let guest = guests.iter().find(|(of, _)| of == pid).map_or(0, |(_, bytes)| *bytes);
        peak.saturating_sub(guest) as f64 / MIB
    });
    let ms = |d: Duration| d.as_secs_f64() * 1e3;
    let us = |ticks: f64| ticks * 1e3 / f64::from(tsc_khz);
    let owed = !matches!(ended.whole, Whole::AtHandOver);
    Ok(Figures {
        total_ms: ms(whole.saturating_sub(ended.began)),
        downtime_ms: ms(seen.downtime),
        foretold_ms: ended.foretold_ms,
        downtime_said_ms: ended.downtime_said_ms,
        stall_ms: ms(seen.longest_stall),
        bytes,
        speed: speed(ended.began, whole)? / full,
        cpu_s: used.cpu.saturating_sub(cpu_before).as_secs_f64(),
        beyond_mib: beyond.fold(0.0, f64::max),
        waits: waits.filter(|s| owed && s.count() > 0).map(|s| Waits {
            count: s.count(),
            mean_us: us(s.ticks as f64 / s.count() as f64),
            p99_us: us(s.percentile(99) as f64),
        }),
        how: ended.how,
    })
}

//! Writes the status page.

use core::fmt::{self, Display, Write};
use core::sync::atomic::{AtomicBool, AtomicU64, Ordering::SeqCst};

use crate::console::say;
use crate::machine::stop;
use crate::memory::{Memory, status_page};
use crate::status::{
    COUNTER_BYTES, LAYOUT_VERSION, MAGIC, MAX_MESSAGE_BYTES, MAX_PARAMS_BYTES, Stalls, State, at,
};
use crate::workload::{Arena, Mismatch};

pub(crate) use crate::status::Counters as Counted;

static CLAIMED: AtomicBool = AtomicBool::new(false);

fn word(offset: usize) -> &'static AtomicU64 {
    // SAFETY: offsets are aligned and lie in the status page, which is nobody else's.
    unsafe { AtomicU64::from_ptr(status_page().add(offset).cast()) }
}

fn put(offset: usize, value: u64) {
    word(offset).store(value, SeqCst);
}

/// Clears the page and says that the guest boots.
pub(crate) fn begin() {
    for offset in (0..crate::status::BYTES).step_by(8) {
        put(offset, 0);
    }
    put(at::LAYOUT_VERSION, LAYOUT_VERSION);
    put(at::STATE, State::Booting as u64);
    put(at::MAGIC, MAGIC);
}

/// Records what the guest is going to do.
pub(crate) fn set_up(setup: &crate::Setup) {
    put(at::CPUS, setup.params.cpus.into());
    put(at::ARENA_PAGES, setup.memory.pages());
    put(at::EXPECTED, setup.memory.table());
    put(at::TSC_KHZ, setup.tsc_khz);
    for (i, (start, pages)) in setup.memory.extents().iter().enumerate() {
        put(at::EXTENT + 16 * i, *start);
        put(at::EXTENT + 16 * i + 8, *pages);
    }
    put(at::EXTENTS, setup.memory.extents().len() as u64);
    text(at::PARAMS_BYTES, at::PARAMS, MAX_PARAMS_BYTES, &setup.params);
}

/// Goes from one state to the next, unless the guest has stopped meanwhile.
pub(crate) fn state(from: State, to: State) {
    let _ = word(at::STATE).compare_exchange(from as u64, to as u64, SeqCst, SeqCst);
}

/// Whether some vCPU said that all must stop.
#[inline]
pub(crate) fn stopped() -> bool {
    word(at::STATE).load(core::sync::atomic::Ordering::Relaxed) >= State::Corrupt as u64
}

/// Publishes a vCPU's counters.
#[inline]
pub(crate) fn count(cpu: u32, counted: Counted) {
    use core::sync::atomic::Ordering::Relaxed;
    let base = at::COUNTERS + cpu as usize * COUNTER_BYTES;
    let values = [counted.written, counted.checked, counted.tsc, counted.filled];
    for (i, value) in values.into_iter().enumerate() {
        word(base + 8 * i).store(value, Relaxed);
    }
}

/// Counts a visit that took so many ticks, if that was long.
#[inline]
pub(crate) fn visit(ticks: u64) {
    if let Some(kind) = Stalls::kind(ticks) {
        word(at::STALLED).fetch_add(ticks, SeqCst);
        word(at::STALLS + 8 * kind).fetch_add(1, SeqCst);
    }
}

/// Publishes how many pages are in the balloon.
pub(crate) fn ballooned(pages: u64) {
    put(at::BALLOONED_PAGES, pages);
}

/// Records a wrong page and stops all vCPUs. The first report counts.
pub(crate) fn corrupt(cpu: u32, memory: &Memory, m: Mismatch) -> ! {
    claim();
    let gpa = memory.page(m.index.into()) as u64;
    put(at::ERROR_CPU, cpu.into());
    put(at::ERROR_KIND, m.kind as u64);
    put(at::ERROR_PAGE, m.index.into());
    put(at::ERROR_GPA, gpa);
    put(at::ERROR_VERSION, m.version.into());
    put(at::ERROR_WORD, m.word.into());
    put(at::ERROR_EXPECTED, m.expected);
    put(at::ERROR_FOUND, m.found);
    put(at::ERROR_HEAD, m.head[0]);
    put(at::ERROR_HEAD + 8, m.head[1]);
    put(at::ERROR, 1);
    put(at::STATE, State::Corrupt as u64);
    say!(
        "CORRUPT vcpu={cpu} page={} gpa={gpa:#x} kind={} version={} word={} expected={:#018x} found={:#018x} head={:#018x},{:#018x}",
        m.index,
        m.kind.name(),
        m.version,
        m.word,
        m.expected,
        m.found,
        m.head[0],
        m.head[1]
    );
    stop()
}

/// The guest cannot do what it was asked for.
pub(crate) fn refuse(why: impl Display) -> ! {
    end(State::BadParams, "BAD-PARAMS", why)
}

/// Something is wrong with the guest or its vCPU.
pub(crate) fn fault(why: impl Display) -> ! {
    end(State::Fault, "FAULT", why)
}

fn end(state: State, label: &str, why: impl Display) -> ! {
    claim();
    text(at::MESSAGE_BYTES, at::MESSAGE, MAX_MESSAGE_BYTES, &why);
    put(at::STATE, state as u64);
    say!("{label} {why}");
    stop()
}

fn claim() {
    if CLAIMED.swap(true, SeqCst) {
        stop();
    }
}

struct Text {
    at: *mut u8,
    left: usize,
    bytes: usize,
}

impl Write for Text {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        for byte in s.bytes().take(self.left) {
            // SAFETY: `left` bounds the text inside the status page.
            unsafe { self.at.add(self.bytes).write_volatile(byte) };
            self.bytes += 1;
            self.left -= 1;
        }
        Ok(())
    }
}

fn text(length: usize, from: usize, most: usize, what: &impl Display) {
    // SAFETY: the offset lies in the status page.
    let mut text = Text { at: unsafe { status_page().add(from) }, left: most, bytes: 0 };
    let _ = write!(text, "{what}");
    put(length, text.bytes as u64);
}

//! Figures of several runs.

use std::fmt;
use std::time::Duration;

use rustix::time::{ClockId, clock_gettime};

/// CPU time of this process so far, all threads together.
pub(crate) fn cpu_time() -> Duration {
    // Not before 1970, and not for 500 years: it fits.
    clock_gettime(ClockId::ProcessCPUTime).try_into().unwrap_or_default()
}

/// CPU time of the calling thread so far.
pub(crate) fn thread_cpu_time() -> Duration {
    clock_gettime(ClockId::ThreadCPUTime).try_into().unwrap_or_default()
}

/// What something took.
#[derive(Clone, Copy)]
pub(crate) struct Cost {
    pub(crate) took: Duration,
    /// CPU time, both hosts together.
    pub(crate) cpu: Duration,
}

/// What was measured in several runs, ascending.
pub(crate) struct Figures(Vec<f64>);

impl Figures {
    pub(crate) fn new(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        Self(values)
    }

    /// The middle one (the upper one of two); NaN of none.
    pub(crate) fn median(&self) -> f64 {
        self.0.get(self.0.len() / 2).copied().unwrap_or(f64::NAN)
    }
}

/// `median (least to most)`, with as many decimals as asked for.
impl fmt::Display for Figures {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let digits = f.precision().unwrap_or(1);
        let ends = (self.0.first(), self.0.last());
        write!(f, "{:.digits$}", self.median())?;
        match ends {
            (Some(least), Some(most)) => write!(f, " ({least:.digits$} to {most:.digits$})"),
            _ => Ok(()),
        }
    }
}

//! How fast a machine dirties its memory, by extent and in total.

use std::time::Duration;

use crate::{Extent, Layout, PageSet};

/// An observation this old counts 1/e of a new one.
const MEMORY: Duration = Duration::from_secs(1);
/// Harvests closer than this are counted together: a rate over a few microseconds is noise.
const SHORTEST: Duration = Duration::from_millis(1);

/// A running estimate of the dirty rate, from successive harvests.
///
/// A harvest counts each page once however often it was written, so that the estimate says how many
/// *distinct* pages a machine dirties a second at the harvest interval in use; a longer interval sees a
/// machine that rewrites few pages as slower. Exponentially weighted by time (one second), so that
/// harvests need not be evenly spaced.
#[derive(Clone, Debug)]
pub struct DirtyRate {
    extents: Vec<Extent>,
    pages_per_s: Vec<f64>,
    /// Harvested, but over too short a time to be judged yet.
    waiting: Vec<u64>,
    waited: Duration,
    observed: bool,
}

impl DirtyRate {
    /// An estimate that has seen nothing of a machine with `layout`.
    pub fn new(layout: &Layout) -> Self {
        let extents = layout.extents().to_vec();
        Self {
            pages_per_s: vec![0.0; extents.len()],
            waiting: vec![0; extents.len()],
            extents,
            waited: Duration::ZERO,
            observed: false,
        }
    }

    /// Takes in a harvest: `pages` were written in the `elapsed` since the one before.
    pub fn observe(&mut self, elapsed: Duration, pages: &PageSet) {
        for (waiting, extent) in self.waiting.iter_mut().zip(&self.extents) {
            *waiting += pages.count_in(*extent);
        }
        self.waited += elapsed;
        if self.waited < SHORTEST {
            return;
        }
        let seconds = self.waited.as_secs_f64();
        // The first harvest is all there is to go by.
        let weight =
            if self.observed { 1.0 - (-seconds / MEMORY.as_secs_f64()).exp() } else { 1.0 };
        for (rate, waiting) in self.pages_per_s.iter_mut().zip(&mut self.waiting) {
            let now = std::mem::take(waiting) as f64 / seconds;
            *rate += weight * (now - *rate);
        }
        self.waited = Duration::ZERO;
        self.observed = true;
    }

    /// Pages dirtied a second in all extents; zero until something was observed.
    pub fn pages_per_s(&self) -> f64 {
        self.pages_per_s.iter().sum()
    }

    /// Pages dirtied a second, by extent of the layout, in its order.
    pub fn by_extent(&self) -> &[f64] {
        &self.pages_per_s
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Run;

    fn rate() -> DirtyRate {
        DirtyRate::new(&Layout::new(vec![Run::new(0, 1000), Run::new(5000, 1000)]).unwrap())
    }

    fn close(a: f64, b: f64) -> bool {
        (a - b).abs() <= 0.01 * b.abs().max(1.0)
    }

    #[test]
    fn a_steady_rate_is_found_by_extent_and_in_total() {
        let mut rate = rate();
        let harvest: PageSet = [Run::new(10, 100), Run::new(5000, 300)].into_iter().collect();
        for _ in 0..20 {
            rate.observe(Duration::from_millis(100), &harvest);
        }
        assert!(close(rate.by_extent()[0], 1000.0) && close(rate.by_extent()[1], 3000.0));
        assert!(close(rate.pages_per_s(), 4000.0));
    }

    #[test]
    fn a_new_rate_is_followed_within_a_few_seconds() {
        let mut rate = rate();
        rate.observe(Duration::from_secs(1), &[Run::new(0, 1000)].into_iter().collect());
        for _ in 0..50 {
            rate.observe(Duration::from_millis(100), &[Run::new(0, 10)].into_iter().collect());
        }
        assert!((100.0..110.0).contains(&rate.pages_per_s()), "{}", rate.pages_per_s());
    }

    #[test]
    fn an_observation_of_a_second_ago_counts_1_e_of_a_new_one() {
        let mut rate = rate();
        let some: PageSet = [Run::new(0, 500)].into_iter().collect();
        rate.observe(Duration::from_millis(500), &some);
        assert!(close(rate.pages_per_s(), 1000.0), "the first is all there is to go by");
        rate.observe(Duration::from_millis(500), &PageSet::new());
        assert!(close(rate.pages_per_s(), 1000.0 * (-0.5f64).exp()), "{}", rate.pages_per_s());
        rate.observe(Duration::from_secs(2), &PageSet::new());
        assert!(close(rate.pages_per_s(), 1000.0 * (-2.5f64).exp()), "{}", rate.pages_per_s());
    }

    #[test]
    fn a_millisecond_is_long_enough_to_judge() {
        let mut rate = rate();
        rate.observe(SHORTEST, &[Run::new(0, 1)].into_iter().collect());
        assert!(close(rate.pages_per_s(), 1000.0));
    }

    #[test]
    fn harvests_too_close_to_judge_are_counted_in_the_next() {
        let mut rate = rate();
        let harvest: PageSet = [Run::new(0, 50)].into_iter().collect();
        rate.observe(Duration::ZERO, &harvest);
        assert!(close(rate.pages_per_s(), 0.0));
        rate.observe(Duration::from_millis(100), &harvest);
        assert!(close(rate.pages_per_s(), 1000.0));
    }
}

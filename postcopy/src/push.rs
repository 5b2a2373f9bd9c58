//! In which order the source pushes the pages that nobody has asked for yet.
//!
//! What a guest touches next is near what it touched last, in space or in time:
//!
//! 1. **Cursors.** Each fault starts one. It follows the stride of the faults before it, if they have
//!    one, and then bubbles: it grows outward from the fault, three pages up for each page down
//!    (Hines and Gopalan, "Post-copy based live virtual machine migration using adaptive
//!    pre-paging and dynamic self-ballooning", VEE 2009).
//! 2. **The record** of the working set, in its own order.
//! 3. **The sweep** of all that is left, from low to high.

use std::collections::VecDeque;

use ferry_pages::{PageSet, Run};

/// Faults in which a stride is looked for. Several vCPUs interleave theirs.
const RECENT_FAULTS: usize = 32;
/// Strides that are known at a time.
const STREAMS: usize = 8;
/// The longest stride, in pages.
const LONGEST_STRIDE: u64 = 512;
/// Pages that a new stream is followed ahead; each fault that proves it doubles them.
const FIRST_DEPTH: u64 = 16;
const DEEPEST: u64 = 128;
/// Cursors that live at a time; the oldest gives way.
const CURSORS: usize = 8;
/// What one cursor may push (1 MiB): a guess must not keep the record waiting for long.
const CURSOR_PAGES: u64 = 256;
/// A cursor that meets so many pages in a row which are not owed has nothing to find.
const MISSES: u32 = 64;
/// Pages that a cursor takes before the next one's turn.
const TURN_PAGES: u64 = 16;

/// The source's queue of owed pages, each given out once: to a fault or to the background.
#[derive(Clone, Debug)]
pub struct PushQueue {
    left: PageSet,
    record: Vec<Run>,
    /// The record's first run that is not done, and how many of its pages are.
    record_at: (usize, u64),
    /// No page is left below it.
    sweep: u64,
    /// Newest first.
    cursors: VecDeque<Cursor>,
    /// Newest first.
    faults: VecDeque<u64>,
    /// Newest first.
    streams: VecDeque<Stream>,
}

/// Faults at a constant distance.
#[derive(Clone, Copy, Debug)]
struct Stream {
    last: u64,
    stride: i64,
    depth: u64,
}

/// Guesses from one fault: first along the stride, then around.
#[derive(Clone, Debug)]
struct Cursor {
    /// Next page along the stride, and how many more there are.
    ahead: Option<u64>,
    stride: i64,
    steps: u64,
    /// Next page above; none at the end of the frame space.
    up: Option<u64>,
    /// Next page below; none at the beginning.
    down: Option<u64>,
    turn: u8,
    pages_left: u64,
    misses: u32,
}

impl Cursor {
    fn new(gfn: u64, stream: Option<Stream>) -> Self {
        let (stride, steps) = stream.map_or((0, 0), |s| (s.stride, s.depth));
        // A stride of one page has been where the bubble would begin.
        let passed = |direction: i64| if stride == direction { steps } else { 0 };
        Self {
            ahead: gfn.checked_add_signed(stride),
            stride,
            steps,
            up: gfn.checked_add(1 + passed(1)),
            down: gfn.checked_sub(1 + passed(-1)),
            turn: 0,
            pages_left: CURSOR_PAGES,
            misses: 0,
        }
    }

    /// The next guess; none when both ends of the frame space are reached.
    fn guess(&mut self) -> Option<u64> {
        if self.steps > 0
            && let Some(ahead) = self.ahead
        {
            self.steps -= 1;
            self.ahead = ahead.checked_add_signed(self.stride);
            return Some(ahead);
        }
        self.turn = (self.turn + 1) % 4;
        let downward = self.turn == 0 && self.down.is_some() || self.up.is_none();
        if downward {
            let down = self.down?;
            self.down = down.checked_sub(1);
            Some(down)
        } else {
            let up = self.up?;
            self.up = up.checked_add(1);
            Some(up)
        }
    }

    /// Moves up to `most` pages of its guesses from `left` to `batch`; whether it has more.
    fn take(&mut self, left: &mut PageSet, most: u64, batch: &mut Vec<Run>) -> bool {
        let mut taken = 0;
        while taken < most && self.pages_left > 0 && self.misses < MISSES {
            let Some(gfn) = self.guess() else { return false };
            if left.contains(gfn) && left.remove(gfn) {
                batch.push(Run::new(gfn, 1));
                taken += 1;
                self.pages_left -= 1;
                self.misses = 0;
            } else {
                self.misses += 1;
            }
        }
        self.pages_left > 0 && self.misses < MISSES
    }
}

impl PushQueue {
    /// A queue of the pages of `owed`. `record` names the pages to send first, in the order to send them;
    /// pages in it that are not owed, or named before, count for nothing.
    pub fn new(owed: PageSet, record: Vec<Run>) -> Self {
        Self {
            left: owed,
            record,
            record_at: (0, 0),
            sweep: 0,
            cursors: VecDeque::new(),
            faults: VecDeque::new(),
            streams: VecDeque::new(),
        }
    }

    /// The destination asked for `gfn`: the pages that it is likely to want next move to the front.
    /// Returns whether the page was still in the queue, which it now is not: send it at once. If not, it was
    /// given out before and is on its way.
    pub fn fault(&mut self, gfn: u64) -> bool {
        let was_left = self.left.remove(gfn);
        let stream = self.stream_of(gfn);
        self.cursors.truncate(CURSORS - 1);
        self.cursors.push_front(Cursor::new(gfn, stream));
        self.faults.truncate(RECENT_FAULTS - 1);
        self.faults.push_front(gfn);
        was_left
    }

    /// Takes the next pages to push out of the queue: at most `max_pages`, ascending and disjoint. Empty
    /// only if the queue is, or `max_pages` is 0.
    pub fn next(&mut self, max_pages: u64) -> Vec<Run> {
        let mut batch = Vec::new();
        let mut room = max_pages;
        while room > 0 && !self.left.is_empty() && !self.cursors.is_empty() {
            let left = &mut self.left;
            self.cursors.retain_mut(|cursor| {
                let before = left.len();
                let lives = cursor.take(left, room.min(TURN_PAGES), &mut batch);
                room -= before - left.len();
                lives
            });
        }
        while room > 0 && !self.left.is_empty() {
            let Some(found) = self.next_of_record().or_else(|| self.next_of_sweep()) else { break };
            let run = Run::new(found.start, found.pages.min(room));
            self.left.remove_run(run);
            room -= run.pages;
            batch.push(run);
        }
        joined(batch)
    }

    /// Takes out pages that came unasked, along with others.
    pub fn remove(&mut self, run: Run) {
        self.left.remove_run(run);
    }

    /// Pages in the queue.
    pub fn len(&self) -> u64 {
        self.left.len()
    }

    /// Whether no page is left to push.
    pub fn is_empty(&self) -> bool {
        self.left.is_empty()
    }

    /// The stream that a fault at `gfn` belongs to, with the fault taken into it.
    fn stream_of(&mut self, gfn: u64) -> Option<Stream> {
        let proven = self.streams.iter().position(|s| s.leads_to(gfn));
        let stream = match proven.and_then(|at| self.streams.remove(at)) {
            Some(s) => Stream { last: gfn, stride: s.stride, depth: (s.depth * 2).min(DEEPEST) },
            // Three faults at the same distance, the one in the middle the newest that fits.
            None => self.faults.iter().find_map(|middle| {
                let stride = stride(*middle, gfn)?;
                let first = middle.checked_add_signed(-stride)?;
                self.faults.contains(&first).then_some(Stream {
                    last: gfn,
                    stride,
                    depth: FIRST_DEPTH,
                })
            })?,
        };
        self.streams.truncate(STREAMS - 1);
        self.streams.push_front(stream);
        Some(stream)
    }

    /// The next pages left that the record names.
    fn next_of_record(&mut self) -> Option<Run> {
        while let Some(run) = self.record.get(self.record_at.0) {
            let rest =
                Run::new(run.start.saturating_add(self.record_at.1), run.pages - self.record_at.1);
            if let Some(found) = first_in(&self.left, rest) {
                self.record_at.1 = found.start - run.start;
                return Some(found);
            }
            self.record_at = (self.record_at.0 + 1, 0);
        }
        None
    }

    /// The lowest pages left.
    fn next_of_sweep(&mut self) -> Option<Run> {
        let found = first_in(&self.left, Run::new(self.sweep, u64::MAX - self.sweep))?;
        self.sweep = found.start;
        Some(found)
    }
}

impl Stream {
    /// Whether `gfn` lies on the stream, at most just behind what a cursor has sent of it.
    fn leads_to(&self, gfn: u64) -> bool {
        let distance = i128::from(gfn) - i128::from(self.last);
        let stride = i128::from(self.stride);
        distance % stride == 0 && (1..=i128::from(self.depth + 1)).contains(&(distance / stride))
    }
}

/// From one page to another, if that can be a stride.
fn stride(from: u64, to: u64) -> Option<i64> {
    if from == to || from.abs_diff(to) > LONGEST_STRIDE {
        return None;
    }
    to.checked_signed_diff(from)
}

/// The first members of `set` in `within`; their run may go on. A set of one huge run is not walked to its
/// end for this, nor is a gap walked page by page.
fn first_in(set: &PageSet, within: Run) -> Option<Run> {
    let (mut at, mut window) = (within.start, 512);
    while at < within.end() {
        let part = Run::new(at, (within.end() - at).min(window));
        if let Some(found) = set.runs_in(part).next() {
            return Some(found);
        }
        at = part.end();
        window = window.saturating_mul(2);
    }
    None
}

/// Disjoint runs in ascending order, with those that touch made one.
fn joined(mut runs: Vec<Run>) -> Vec<Run> {
    runs.sort_unstable();
    runs.dedup_by(|next, run| {
        let touch = run.end() == next.start;
        if touch {
            run.pages += next.pages;
        }
        touch
    });
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queue(owed: &[Run], record: &[Run]) -> PushQueue {
        PushQueue::new(owed.iter().copied().collect(), record.to_vec())
    }

    /// The next `most` pages one by one, in the order in which they go.
    fn order(queue: &mut PushQueue, most: usize) -> Vec<u64> {
        std::iter::from_fn(|| queue.next(1).first().map(|run| run.start)).take(most).collect()
    }

    #[test]
    fn the_record_goes_in_its_own_order_and_the_rest_from_low_to_high() {
        let mut queue = queue(
            &[Run::new(10, 10), Run::new(50, 2)],
            &[Run::new(15, 2), Run::new(12, 4), Run::new(90, 9)],
        );
        assert_eq!(order(&mut queue, 99), [15, 16, 12, 13, 14, 10, 11, 17, 18, 19, 50, 51]);
    }

    #[test]
    fn pages_that_came_unasked_are_not_given_out() {
        let mut queue = queue(&[Run::new(0, 100)], &[Run::new(50, 2)]);
        queue.fault(80);
        queue.remove(Run::new(2, 79));
        queue.remove(Run::new(200, 5));
        assert_eq!(queue.len(), 21);
        let mut rest = order(&mut queue, 99);
        rest.sort_unstable();
        assert_eq!(rest, (0..2).chain(81..100).collect::<Vec<_>>());
    }

    #[test]
    fn a_fault_draws_its_surroundings_and_more_of_what_is_above() {
        let mut queue = queue(&[Run::new(0, 2000)], &[Run::new(5, 1)]);
        assert!(queue.fault(1000));
        assert!(!queue.fault(1000));
        assert_eq!(order(&mut queue, 8), [1001, 1002, 1003, 999, 1004, 1005, 1006, 998],);
    }

    #[test]
    fn a_cursor_ends_and_the_record_has_its_turn() {
        let mut queue = queue(&[Run::new(0, 100_000)], &[Run::new(5, 1)]);
        queue.fault(50_000);
        let order = order(&mut queue, 2000);
        let at = order.iter().position(|gfn| *gfn == 5).unwrap();
        assert_eq!(at as u64, CURSOR_PAGES);
        assert_eq!(order[at + 1..at + 4], [0, 1, 2]);
    }

    #[test]
    fn a_cursor_gives_no_more_than_its_pages_however_many_are_asked_for() {
        for at_a_time in [1, 10, 16, 100, 300] {
            let mut queue = queue(&[Run::new(0, 100_000)], &[Run::new(5, 1)]);
            queue.fault(50_000);
            let mut given = PageSet::new();
            while !given.contains(5) {
                given.extend(queue.next(at_a_time));
            }
            let around = given.count_in(Run::new(49_000, 2000));
            assert_eq!(around, CURSOR_PAGES, "{at_a_time} at a time");
        }
    }

    #[test]
    fn the_oldest_cursor_gives_way_to_the_ninth() {
        let mut queue = queue(&[Run::new(0, 200_000)], &[Run::new(5, 1)]);
        let faults: Vec<u64> = (1..=9).map(|k| k * 20_000).collect();
        faults.iter().for_each(|gfn| assert!(queue.fault(*gfn)));
        let mut given = PageSet::new();
        while !given.contains(5) {
            given.extend(queue.next(1));
        }
        for gfn in faults {
            let around = given.count_in(Run::new(gfn - 5000, 10_000));
            assert_eq!(around, if gfn == 20_000 { 0 } else { CURSOR_PAGES }, "{gfn}");
        }
    }

    #[test]
    fn a_stride_is_looked_for_in_the_last_32_faults() {
        for (between, found) in [(0, true), (30, true), (31, false)] {
            let mut queue = queue(&[Run::new(0, 1 << 20)], &[]);
            let others = (1..=between).map(|k| 10_000 + k * 10_000);
            for gfn in [100, 107].into_iter().chain(others).chain([114]) {
                queue.fault(gfn);
            }
            let next = if found { 121 } else { 115 };
            assert_eq!(order(&mut queue, 1), [next], "{between} faults between");
        }
    }

    #[test]
    fn eight_streams_are_known_and_a_fault_that_proves_one_is_followed_twice_as_far() {
        for (stream, pages) in [(0, FIRST_DEPTH), (1, 2 * FIRST_DEPTH), (8, 2 * FIRST_DEPTH)] {
            let mut queue = queue(&[Run::new(0, 1 << 20)], &[]);
            let at = |stream: u64, k: u64| 20_000 * (stream + 1) + 7 * k;
            for other in 0..9 {
                (0..3).for_each(|k| assert!(queue.fault(at(other, k))));
            }
            queue.fault(at(stream, 3));
            let along: Vec<u64> = (4..4 + pages).map(|k| at(stream, k)).collect();
            let next = order(&mut queue, along.len() + 1);
            assert_eq!(next[..along.len()], along, "stream {stream}");
            assert_eq!(next[along.len()], at(stream, 3) + 1, "stream {stream}");
        }
    }

    #[test]
    fn a_stream_is_followed_so_far_and_then_its_surroundings_are_drawn() {
        let mut queue = queue(&[Run::new(0, 100_000)], &[]);
        [50_000, 50_007, 50_014].into_iter().for_each(|gfn| assert!(queue.fault(gfn)));
        let order = order(&mut queue, 16 + 4);
        assert_eq!(order[15], 50_014 + 16 * 7);
        assert_eq!(order[16..], [50_015, 50_016, 50_017, 50_013]);
    }

    #[test]
    fn faults_at_a_constant_distance_are_followed() {
        for stride in [1, -1, 7, -512, 300] {
            let mut queue = queue(&[Run::new(0, 100_000)], &[]);
            let at = |k: i64| 50_000_u64.checked_add_signed(k * stride).unwrap();
            for k in 0..3 {
                queue.fault(at(k));
            }
            let expected: Vec<u64> = (3..3 + 16).map(at).collect();
            assert_eq!(order(&mut queue, 16), expected, "stride {stride}");
            // The next fault is behind what was sent, and proves the stream: twice as far.
            queue.fault(at(19));
            let expected: Vec<u64> = (20..20 + 32).map(at).collect();
            // In turns with the older cursors.
            let next = order(&mut queue, 200);
            let found: Vec<u64> = next.into_iter().filter(|gfn| expected.contains(gfn)).collect();
            assert_eq!(found, expected, "stride {stride}");
        }
    }

    #[test]
    fn strides_of_several_vcpus_are_told_apart() {
        let mut queue = queue(&[Run::new(0, 200_000)], &[]);
        let strides = [(10_000, 3_i64), (10_100, -5), (60_000, 64), (150_000, 1)];
        let at = |(base, stride): (u64, i64), k: i64| base.checked_add_signed(k * stride).unwrap();
        for k in 0..3 {
            for vcpu in strides {
                queue.fault(at(vcpu, k));
            }
        }
        // One turn of each of the four newest cursors, newest first.
        let pages: PageSet = queue.next(4 * TURN_PAGES).into_iter().collect();
        for vcpu in strides {
            assert!((3..3 + 16).all(|k| pages.contains(at(vcpu, k))), "{vcpu:?}: {pages:?}");
        }
    }

    #[test]
    fn the_ends_of_the_frame_space_stop_a_cursor() {
        let mut queue = queue(&[Run::new(0, 3), Run::new(u64::MAX - 3, 3)], &[]);
        queue.fault(1);
        queue.fault(u64::MAX - 2);
        queue.fault(u64::MAX);
        queue.fault(0);
        assert_eq!(order(&mut queue, 99), [2, u64::MAX - 1, u64::MAX - 3]);
    }

    #[test]
    fn a_record_of_all_frames_and_a_huge_guest_do_not_slow_it_down() {
        // 16 TiB, and a record without bounds: in reasonable time only if neither is walked.
        let mut queue =
            queue(&[Run::new(0, 1 << 32)], &[Run::new(1 << 40, u64::MAX), Run::new(7, u64::MAX)]);
        for k in 0..20_000 {
            assert_eq!(queue.next(256), [Run::new(7 + k * 256, 256)]);
        }
    }
}

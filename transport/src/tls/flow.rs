//! What the two ends of a TLS link say to each other, and what each has to keep: pure.
//!
//! TCP gives one stream of bytes each way, and tells neither whether the other process has them, nor why it left. So
//! the stream is cut into frames:
//!
//! ```text
//!   kind u8, length u24 (little endian), then `length` bytes
//!   0 DATA       bytes of the channel                  4 RESET     what came is not complete
//!   1 ALLOW      u64: what may be spent since the      5 STOP      nobody reads any more
//!                beginning; the first frame of each    6 CLOSE     why: the whole channel ends
//!   2 FINISH     that was all                          7 PING      still here
//!   3 HAVE_ALL   FINISH has come
//! ```
//! Whatever arrives is read at once, if somebody waits for it or not: so a close, and that the peer is there, are
//! always heard. That it does not pile up is what ALLOW is for: a DATA frame costs its bytes and [`FRAME_COST`], and
//! no more is spent than the reader allows, who allows more as bytes are taken from it.

use std::collections::VecDeque;

use bytes::{Buf, BufMut, Bytes, BytesMut};

use crate::LinkError;
use crate::secure::plain;

const DATA: u8 = 0;
const ALLOW: u8 = 1;
const FINISH: u8 = 2;
const HAVE_ALL: u8 = 3;
const RESET: u8 = 4;
const STOP: u8 = 5;
const CLOSE: u8 = 6;
const PING: u8 = 7;

const HEADER_BYTES: usize = 4;
/// Of the first frame.
pub(super) const FIRST_BYTES: usize = HEADER_BYTES + 8;
/// Of a DATA frame.
const MAX_DATA_BYTES: usize = 64 << 10;
/// What a DATA frame costs beyond its bytes: more than it takes to keep it.
const FRAME_COST: u64 = 64;
/// Of the words of a CLOSE; they are cut there.
const MAX_REASON_BYTES: usize = 1000;
/// What a sink takes before the link does.
pub(super) const QUEUE_BYTES: usize = 1 << 20;
/// What is handed to TLS at once.
const STAGE_BYTES: usize = 256 << 10;
/// A piece that is smaller is copied: it would keep all of the buffer that it came in.
const SMALL_BYTES: usize = 16 << 10;

/// Which frame is being read.
enum Reading {
    Header,
    /// Bytes of it that are to come, and what the next piece costs beyond its bytes.
    Data {
        left: usize,
        cost: u64,
    },
    Word {
        kind: u8,
        bytes: usize,
    },
}

/// How what the peer sends ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Ended {
    Finished,
    Reset,
}

/// How far our own end got.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Finish {
    Not,
    Wanted,
    Said,
    /// The peer has all.
    Heard,
}

/// One end of a link. [`receive`](Self::receive) takes what came, [`stage`](Self::stage) gives what is to be sent.
pub(super) struct Flow {
    remote: String,
    queue: VecDeque<Bytes>,
    queued: usize,
    spent: u64,
    allowed: u64,
    /// Frames without data, to be sent next.
    words: BytesMut,
    finish: Finish,
    /// The sink, and the source, are gone.
    sink_gone: bool,
    source_gone: bool,
    /// The peer reads no more.
    stopped: bool,

    reading: Reading,
    /// What came and was not taken, each with its cost.
    pieces: VecDeque<(Bytes, u64)>,
    came: u64,
    taken: u64,
    /// What the peer may spend, as it was told.
    granted: u64,
    window: u64,
    ended: Option<Ended>,

    /// Why the whole channel is over.
    over: Option<LinkError>,
    /// Its end is this side's, who says so yet.
    leaving: bool,
}

impl Flow {
    /// `window`: bytes that nobody has read, at most.
    pub(super) fn new(remote: &str, window: u32) -> Self {
        let mut flow = Self {
            remote: remote.to_owned(),
            queue: VecDeque::new(),
            queued: 0,
            spent: 0,
            allowed: 0,
            words: BytesMut::new(),
            finish: Finish::Not,
            sink_gone: false,
            source_gone: false,
            stopped: false,
            reading: Reading::Header,
            pieces: VecDeque::new(),
            came: 0,
            taken: 0,
            granted: 0,
            window: window.into(),
            ended: None,
            over: None,
            leaving: false,
        };
        flow.grant();
        flow
    }

    fn lost(&self, why: &str) -> LinkError {
        LinkError::Lost { remote: self.remote.clone(), why: why.to_owned() }
    }

    fn say(&mut self, kind: u8, bytes: &[u8]) {
        self.words.put_slice(&header(kind, bytes.len()));
        self.words.put_slice(bytes);
    }

    // The sink.

    /// Takes `bytes`, if there is room.
    pub(super) fn send(&mut self, bytes: &Bytes) -> Option<Result<(), LinkError>> {
        if let Err(e) = self.may_send() {
            return Some(Err(e));
        }
        if self.queued >= QUEUE_BYTES {
            return None;
        }
        if !bytes.is_empty() {
            self.queued += bytes.len();
            self.queue.push_back(bytes.clone());
        }
        Some(Ok(()))
    }

    fn may_send(&self) -> Result<(), LinkError> {
        match &self.over {
            Some(e) => Err(e.clone()),
            None if self.stopped => Err(self.lost("the peer stopped reading")),
            None if self.finish != Finish::Not => Err(self.lost("this side finished before")),
            None => Ok(()),
        }
    }

    /// Nothing more will be sent.
    pub(super) fn finish(&mut self) -> Result<(), LinkError> {
        self.may_send()?;
        self.finish = Finish::Wanted;
        Ok(())
    }

    /// Whether the peer has all.
    pub(super) fn finished(&self) -> Option<Result<(), LinkError>> {
        match &self.over {
            _ if self.finish == Finish::Heard => Some(Ok(())),
            Some(e) => Some(Err(e.clone())),
            None if self.stopped => Some(Err(self.lost("the peer stopped reading"))),
            None => None,
        }
    }

    /// Whether who waits for the sink has something to do.
    pub(super) fn sink_moves(&self) -> bool {
        self.over.is_some()
            || self.stopped
            || self.finish == Finish::Heard
            || self.queued < QUEUE_BYTES / 2
    }

    pub(super) fn drop_sink(&mut self) {
        self.sink_gone = true;
        if self.finish == Finish::Not {
            self.forget_queue();
            self.say(RESET, &[]);
        }
    }

    fn forget_queue(&mut self) {
        self.queue.clear();
        self.queued = 0;
    }

    /// Ends the channel; the first reason stands.
    pub(super) fn close(&mut self, reason: &str) {
        self.leave(reason, self.lost("this side closed it"));
    }

    fn leave(&mut self, reason: &str, over: LinkError) {
        if self.over.is_none() {
            self.forget_queue();
            let reason = &reason.as_bytes()[..reason.floor_char_boundary(MAX_REASON_BYTES)];
            self.say(CLOSE, reason);
            (self.over, self.leaving) = (Some(over), true);
        }
    }

    // The source.

    /// The next piece.
    pub(super) fn take(&mut self) -> Option<Bytes> {
        let (piece, cost) = self.pieces.pop_front()?;
        self.taken += cost;
        Some(piece)
    }

    /// What whoever finds no piece is told, if there will be none.
    pub(super) fn no_more(&self) -> Option<Result<(), LinkError>> {
        match (self.ended, &self.over) {
            (Some(Ended::Finished), _) => Some(Ok(())),
            (None, Some(e)) => Some(Err(e.clone())),
            (Some(Ended::Reset), _) => {
                Some(Err(self.lost("the peer went away before it finished")))
            }
            (None, None) => None,
        }
    }

    pub(super) fn source_moves(&self) -> bool {
        !self.pieces.is_empty() || self.no_more().is_some()
    }

    pub(super) fn drop_source(&mut self) {
        self.source_gone = true;
        self.pieces.clear();
        if self.ended.is_none() {
            self.say(STOP, &[]);
        }
    }

    pub(super) fn widen(&mut self, window: u32) {
        self.window = self.window.max(window.into());
    }

    // The connection.

    /// Whether there is something to be staged.
    pub(super) fn has_words(&self) -> bool {
        !self.words.is_empty() || self.grants() || self.finish == Finish::Wanted
    }

    fn grants(&self) -> bool {
        let (now, step) = (self.taken + self.window, self.window / 4);
        !self.source_gone && self.ended.is_none() && now >= self.granted + step
    }

    fn grant(&mut self) {
        self.granted = self.taken + self.window;
        self.say(ALLOW, &self.granted.to_le_bytes());
    }

    /// Says that this side is there.
    pub(super) fn ping(&mut self) {
        self.say(PING, &[]);
    }

    /// Appends to `out` what is to be sent, whole frames, until it has about [`STAGE_BYTES`].
    pub(super) fn stage(&mut self, out: &mut VecDeque<Bytes>) {
        if self.grants() {
            self.grant();
        }
        if !self.words.is_empty() {
            out.push_back(self.words.split().freeze());
        }
        let mut staged: usize = out.iter().map(Bytes::len).sum();
        while self.queued > 0 && staged < STAGE_BYTES {
            let room = (self.allowed - self.spent).saturating_sub(FRAME_COST);
            let room = usize::try_from(room).unwrap_or(usize::MAX);
            let bytes = self.queued.min(MAX_DATA_BYTES).min(room);
            if bytes == 0 {
                return;
            }
            out.push_back(Bytes::copy_from_slice(&header(DATA, bytes)));
            self.spent += bytes as u64 + FRAME_COST;
            self.queued -= bytes;
            staged += bytes;
            let mut left = bytes;
            while let Some(first) = self.queue.front_mut().filter(|_| left > 0) {
                let part = first.split_to(first.len().min(left));
                left -= part.len();
                if first.is_empty() {
                    self.queue.pop_front();
                }
                out.push_back(part);
            }
        }
        if self.finish == Finish::Wanted && self.queued == 0 {
            self.finish = Finish::Said;
            out.push_back(Bytes::copy_from_slice(&header(FINISH, 0)));
        }
    }

    /// Takes all whole frames of `input`, and of the last one what it is worth to take.
    pub(super) fn receive(&mut self, input: &mut BytesMut) {
        while self.over.is_none() {
            let wrong = match self.reading {
                Reading::Header if input.len() < HEADER_BYTES => return,
                Reading::Header => {
                    let header = input.get_u32_le();
                    let (kind, bytes) = (header.to_le_bytes()[0], (header >> 8) as usize);
                    self.begin(kind, bytes)
                }
                Reading::Data { left, cost } => {
                    let bytes = left.min(input.len());
                    if bytes < left.min(SMALL_BYTES) {
                        return;
                    }
                    let piece = if bytes < SMALL_BYTES {
                        let piece = Bytes::copy_from_slice(&input[..bytes]);
                        input.advance(bytes);
                        piece
                    } else {
                        input.split_to(bytes).freeze()
                    };
                    let cost = cost + bytes as u64;
                    if !self.source_gone {
                        self.pieces.push_back((piece, cost));
                    }
                    self.reading = match left - bytes {
                        0 => Reading::Header,
                        left => Reading::Data { left, cost: 0 },
                    };
                    Ok(())
                }
                Reading::Word { bytes, .. } if input.len() < bytes => return,
                Reading::Word { kind, bytes } => {
                    self.reading = Reading::Header;
                    self.word(kind, &input.split_to(bytes))
                }
            };
            if let Err(wrong) = wrong {
                let why = format!("the peer does not keep to the protocol: it {wrong}");
                self.leave(&why, self.lost(&why));
            }
        }
        // Nothing after the end is of any use.
        input.clear();
    }

    fn begin(&mut self, kind: u8, bytes: usize) -> Result<(), &'static str> {
        let fits = match kind {
            DATA => bytes <= MAX_DATA_BYTES,
            ALLOW => bytes == 8,
            CLOSE => bytes <= MAX_REASON_BYTES,
            FINISH | HAVE_ALL | RESET | STOP | PING => bytes == 0,
            _ => false,
        };
        if !fits {
            return Err("sent what is no frame");
        }
        self.reading = Reading::Word { kind, bytes };
        if kind == DATA {
            let cost = bytes as u64 + FRAME_COST;
            self.came += cost;
            if self.came > self.granted {
                return Err("sent more than it may");
            }
            if self.ended.is_some() {
                return Err("sent more after the end");
            }
            self.reading = Reading::Data { left: bytes, cost: FRAME_COST };
            if bytes == 0 {
                self.taken += cost;
                self.reading = Reading::Header;
            }
        }
        Ok(())
    }

    fn word(&mut self, kind: u8, mut word: &[u8]) -> Result<(), &'static str> {
        match kind {
            ALLOW => self.allowed = self.allowed.max(word.get_u64_le()),
            FINISH | RESET if self.ended.is_some() => return Err("ended twice"),
            FINISH => {
                self.ended = Some(Ended::Finished);
                self.say(HAVE_ALL, &[]);
            }
            RESET => self.ended = Some(Ended::Reset),
            HAVE_ALL if self.finish == Finish::Said => self.finish = Finish::Heard,
            HAVE_ALL => return Err("has what was not sent"),
            STOP => {
                self.stopped = true;
                self.forget_queue();
            }
            CLOSE => {
                let (remote, reason) = (self.remote.clone(), plain(word));
                self.over = Some(match reason.is_empty() {
                    true => self.lost("the peer closed it without a reason"),
                    false => LinkError::Closed { remote, reason },
                });
            }
            // A ping.
            _ => {}
        }
        Ok(())
    }

    /// The connection is gone; the first reason stands.
    pub(super) fn break_off(&mut self, why: LinkError) {
        self.over.get_or_insert(why);
        self.leaving = false;
    }

    /// Whether the channel is over, and if so, whether the peer has to be told.
    pub(super) fn over(&self) -> Option<bool> {
        match self.over {
            Some(_) => Some(self.leaving),
            None => (self.sink_gone && self.source_gone).then_some(true),
        }
    }
}

/// No frame is as long as 16 MiB.
fn header(kind: u8, bytes: usize) -> [u8; HEADER_BYTES] {
    let [low, middle, high, ..] = bytes.to_le_bytes();
    [kind, low, middle, high]
}

#[cfg(test)]
mod tests {
    use super::*;

    const WINDOW: u32 = 64 << 10;

    /// Two ends and the bytes between them, which arrive in pieces of `cut`.
    struct Pair {
        left: Flow,
        right: Flow,
        cut: usize,
        inputs: [BytesMut; 2],
    }

    impl Pair {
        fn new(cut: usize) -> Self {
            let end = || Flow::new("there", WINDOW);
            Self { left: end(), right: end(), cut, inputs: Default::default() }
        }

        /// Carries all that there is, both ways.
        fn carry(&mut self) {
            loop {
                let Self { left, right, cut, inputs: [to_right, to_left] } = self;
                let moved = pass(left, right, to_right, *cut) | pass(right, left, to_left, *cut);
                if !moved {
                    return;
                }
            }
        }
    }

    fn pass(from: &mut Flow, to: &mut Flow, input: &mut BytesMut, cut: usize) -> bool {
        let mut out = VecDeque::new();
        from.stage(&mut out);
        let bytes = Vec::from(out).concat();
        for piece in bytes.chunks(cut) {
            input.extend_from_slice(piece);
            to.receive(input);
        }
        !bytes.is_empty()
    }

    fn bytes(n: usize) -> Bytes {
        (0..=250).cycle().take(n).collect::<Vec<u8>>().into()
    }

    fn drain(flow: &mut Flow) -> Vec<u8> {
        std::iter::from_fn(|| flow.take()).flatten().collect()
    }

    #[test]
    fn bytes_come_in_order_however_the_stream_is_cut() {
        for cut in [1, 3, 5, 1000, 16_384, usize::MAX] {
            let mut pair = Pair::new(cut);
            let sent = [1, 60_000, 0, 7, 200_000, 64 << 10].map(bytes);
            let mut came = Vec::new();
            for piece in &sent {
                pair.left.send(piece).unwrap().unwrap();
            }
            pair.left.finish().unwrap();
            while pair.right.no_more().is_none() || pair.right.source_moves() {
                pair.carry();
                let some = drain(&mut pair.right);
                came.extend_from_slice(&some);
                if some.is_empty() {
                    break;
                }
            }
            assert!(came == sent.concat(), "cut {cut}");
            assert_eq!(pair.right.no_more(), Some(Ok(())), "cut {cut}");
            pair.carry();
            assert_eq!(pair.left.finished(), Some(Ok(())), "cut {cut}");
        }
    }

    #[test]
    fn no_more_is_sent_than_the_reader_allows_and_little_pieces_cost_more_than_their_bytes() {
        for size in [1, 100, 5000, 60_000] {
            let mut pair = Pair::new(usize::MAX);
            for _ in 0..20_000 {
                match pair.left.send(&bytes(size)) {
                    Some(sent) => sent.unwrap(),
                    None => break,
                }
                pair.carry();
            }
            let (kept, held): (Vec<_>, u64) = (
                pair.right.pieces.iter().map(|(piece, _)| piece.len()).collect(),
                pair.right.pieces.iter().map(|(_, cost)| cost).sum(),
            );
            assert!(held <= u64::from(WINDOW), "{size}: {held}");
            assert!(kept.len() as u64 * FRAME_COST <= u64::from(WINDOW), "{size}: {}", kept.len());
            let before = drain(&mut pair.right).len();
            pair.right.widen(1 << 20);
            pair.carry();
            assert!(
                before > 0 && !pair.right.pieces.is_empty(),
                "{size}: it goes on when it is read"
            );
        }
    }

    #[test]
    fn a_piece_that_is_kept_keeps_no_more_memory_than_four_times_its_bytes() {
        // One byte of data in a buffer full of pings.
        let mut flow = Flow::new("there", WINDOW);
        let mut input = BytesMut::with_capacity(64 << 10);
        input.extend_from_slice(&header(DATA, 1));
        input.put_u8(7);
        for _ in 0..16_000 {
            input.extend_from_slice(&header(PING, 0));
        }
        let buffer = input.as_ptr();
        flow.receive(&mut input);
        let piece = flow.take().unwrap();
        assert_eq!(piece, &[7][..]);
        assert!(!buffer.wrapping_add(HEADER_BYTES).eq(&piece.as_ptr()), "it keeps the buffer");
        // A long frame that comes byte by byte is one piece, not many.
        input.extend_from_slice(&header(DATA, 10_000));
        for _ in 0..10_000 {
            input.put_u8(1);
            flow.receive(&mut input);
        }
        assert_eq!(flow.pieces.len(), 1);
    }

    #[test]
    fn what_was_sent_before_the_sink_was_dropped_is_read_and_then_the_loss() {
        let mut pair = Pair::new(7);
        pair.left.send(&bytes(10)).unwrap().unwrap();
        pair.carry();
        pair.left.drop_sink();
        pair.carry();
        assert_eq!(drain(&mut pair.right).len(), 10);
        assert!(matches!(pair.right.no_more(), Some(Err(LinkError::Lost { .. }))));
        assert_eq!(pair.right.over(), None, "the other direction goes on");
        pair.right.send(&bytes(3)).unwrap().unwrap();
        pair.carry();
        assert_eq!(drain(&mut pair.left).len(), 3);
    }

    #[test]
    fn the_first_reason_stands_and_passes_all_that_waits() {
        let mut pair = Pair::new(100);
        for _ in 0..16 {
            pair.left.send(&bytes(64 << 10)).unwrap().unwrap();
        }
        pair.left.close("one");
        pair.left.close("two");
        pair.left.break_off(LinkError::Refused { remote: "x".into() });
        assert!(pair.left.send(&bytes(1)).unwrap().is_err());
        let mut out = VecDeque::new();
        pair.left.stage(&mut out);
        let mut input = BytesMut::from(&Vec::from(out).concat()[..]);
        assert!(input.len() < 100, "nothing else is sent any more");
        pair.right.receive(&mut input);
        assert_eq!(pair.right.over(), Some(false));
        let error = pair.right.send(&bytes(1)).unwrap().unwrap_err();
        assert!(matches!(&error, LinkError::Closed { reason, .. } if reason == "one"), "{error}");
    }

    #[test]
    fn a_peer_that_grants_more_than_there_is_harms_nobody() {
        let mut flow = Flow::new("there", WINDOW);
        let grant = [&header(ALLOW, 8)[..], &u64::MAX.to_le_bytes()].concat();
        for _ in 0..3 {
            flow.receive(&mut BytesMut::from(&grant[..]));
            flow.send(&bytes(100)).unwrap().unwrap();
            let mut out = VecDeque::new();
            flow.stage(&mut out);
            assert!(Vec::from(out).concat().len() > 100);
        }
        assert_eq!(flow.over(), None);
    }

    #[test]
    fn frames_of_chance_break_no_limit_and_end_in_a_reason() {
        let mut seed = 1_u64;
        let mut dice = |n: u64| {
            seed = seed
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % n
        };
        let mut ended = 0;
        for _ in 0..3000 {
            let mut flow = Flow::new("there", WINDOW);
            let mut input = BytesMut::new();
            for _ in 0..dice(40) {
                let kind = u8::try_from(dice(9)).unwrap();
                let length = match kind {
                    DATA => usize::try_from(dice(30_000)).unwrap(),
                    ALLOW => 8,
                    CLOSE => usize::try_from(dice(1200)).unwrap(),
                    _ => usize::from(dice(50) == 0),
                };
                input.extend_from_slice(&header(kind, length));
                // What is announced does not always come.
                let comes = if dice(100) == 0 { length / 2 } else { length };
                (0..comes).for_each(|_| input.put_u8(u8::try_from(dice(256)).unwrap()));
                flow.receive(&mut input);
                let mut out = VecDeque::new();
                match dice(6) {
                    0 => drop(flow.take()),
                    1 => drop(flow.send(&bytes(5000))),
                    2 if dice(10) == 0 => drop(flow.finish()),
                    _ => flow.stage(&mut out),
                }
                let held: u64 = flow.pieces.iter().map(|(_, cost)| cost).sum();
                assert!(held <= u64::from(WINDOW) && flow.spent <= flow.allowed);
                assert!(flow.words.len() < 64 << 10 && input.len() < 64 << 10);
            }
            ended += u32::from(flow.over().is_some());
        }
        assert!(ended > 1000, "{ended}");
    }
}

//! The task of a connection: reads whatever comes, sends what its state has to say, and ends it.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::io::{self, IoSlice};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::time::{Instant, Interval, MissedTickBehavior, interval, timeout};
use tokio_rustls::TlsStream;

use super::errors;
use super::halves::Shared;
use super::{Io, READ_BYTES};
use crate::LinkError;
use crate::secure::{CLOSE_WAIT, IDLE_TIMEOUT, KEEP_ALIVE};

/// How often it is looked whether somebody is silent.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// Ciphertext that rustls keeps while the socket is full.
const CIPHERTEXT_BYTES: usize = 256 << 10;
/// Pieces that are handed over at once.
const PIECES: usize = 64;
/// A read has at least so much room: one record of TLS.
const RECORD_BYTES: usize = 16 << 10;
/// How often is read and written before others have their turn.
const TURNS: usize = 32;

struct Driver {
    stream: TlsStream<Io>,
    shared: Arc<Shared>,
    remote: String,
    input: BytesMut,
    /// Why nothing more comes.
    broken: Option<LinkError>,
    output: VecDeque<Bytes>,
    /// What was written lies in rustls, perhaps.
    unflushed: bool,
    look: Interval,
    heard: Instant,
    said: Instant,
    /// Until when the end may take to leave.
    leave_by: Option<Instant>,
}

/// Its halves, and nobody to drive them any more.
struct Halves(Arc<Shared>, String);

impl Drop for Halves {
    fn drop(&mut self) {
        self.0.lock().end(errors::lost(&self.1, "what drove it on this side has ended"));
    }
}

/// Drives the connection to its end, on the runtime of the caller. `input` has come already.
pub(super) fn drive(
    mut stream: TlsStream<Io>,
    input: BytesMut,
    shared: Arc<Shared>,
    remote: String,
) {
    match &mut stream {
        TlsStream::Client(s) => s.get_mut().1.set_buffer_limit(Some(CIPHERTEXT_BYTES)),
        TlsStream::Server(s) => s.get_mut().1.set_buffer_limit(Some(CIPHERTEXT_BYTES)),
    }
    let mut look = interval(LOOK_EVERY);
    look.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let halves = Halves(shared.clone(), remote.clone());
    let (now, output) = (Instant::now(), VecDeque::new());
    let mut driver = Driver {
        stream,
        shared,
        remote,
        input,
        broken: None,
        output,
        unflushed: false,
        look,
        heard: now,
        said: now,
        leave_by: None,
    };
    tokio::spawn(async move {
        driver.shared.lock().flow.receive(&mut driver.input);
        let ended = poll_fn(|cx| driver.poll(cx)).await;
        let leaves = ended.is_ok();
        if let Err(why) = ended {
            halves.0.lock().end(why);
        }
        let farewell = async {
            let _ = driver.stream.shutdown().await;
            // What is not read when a socket is closed has the peer lose what it has not read.
            while leaves && matches!(driver.stream.read_buf(&mut driver.input).await, Ok(1..)) {
                driver.input.clear();
            }
        };
        let _ = timeout(CLOSE_WAIT, farewell).await;
        drop(halves);
    });
}

impl Driver {
    /// Ready when the connection is over: with why, unless one side left as it should.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        for _ in 0..TURNS {
            let read = match self.read(cx) {
                Poll::Ready(Ok(())) => true,
                Poll::Ready(Err(why)) => return Poll::Ready(Err(why)),
                Poll::Pending => false,
            };
            let over = {
                let mut state = self.shared.lock();
                if read {
                    state.flow.receive(&mut self.input);
                    state.wake_halves();
                }
                state.wait(cx.waker());
                let queued = self.output.len();
                state.flow.stage(&mut self.output);
                if self.output.len() > queued {
                    state.wake_halves();
                }
                state.flow.over()
            };
            if over == Some(false) {
                // The peer closed it, and the halves know.
                return Poll::Ready(Ok(()));
            }
            let wrote = match self.write(cx) {
                Poll::Ready(Ok(wrote)) => wrote,
                Poll::Ready(Err(e)) => return Poll::Ready(Err(errors::io(&e, &self.remote))),
                Poll::Pending => false,
            };
            if over == Some(true) {
                let by = *self.leave_by.get_or_insert_with(|| Instant::now() + CLOSE_WAIT);
                let all_out = self.output.is_empty() && !self.unflushed;
                if all_out || Instant::now() >= by {
                    return Poll::Ready(Ok(()));
                }
            }
            if !read && !wrote && self.look(cx)?.is_pending() {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Ready with what came, before it is said that nothing more will.
    fn read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        let mut read = false;
        while self.broken.is_none() {
            if self.input.capacity() - self.input.len() < RECORD_BYTES {
                if read {
                    break;
                }
                self.input.reserve(READ_BYTES);
            }
            match pin!(self.stream.read_buf(&mut self.input)).poll(cx) {
                Poll::Ready(Ok(1..)) => {
                    read = true;
                    self.heard = Instant::now();
                }
                Poll::Ready(Ok(0)) => {
                    self.broken = Some(errors::lost(&self.remote, errors::NO_WORD));
                }
                Poll::Ready(Err(e)) => self.broken = Some(errors::io(&e, &self.remote)),
                Poll::Pending if read => break,
                Poll::Pending => return Poll::Pending,
            }
        }
        match self.broken.take_if(|_| !read) {
            Some(why) => Poll::Ready(Err(why)),
            None => Poll::Ready(Ok(())),
        }
    }

    /// Whether something was written.
    fn write(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<bool>> {
        let mut stream = Pin::new(&mut self.stream);
        if self.output.is_empty() {
            if self.unflushed {
                ready!(stream.poll_flush(cx))?;
                self.unflushed = false;
            }
            return Poll::Ready(Ok(false));
        }
        let mut slices = [IoSlice::new(&[]); PIECES];
        for (slice, piece) in slices.iter_mut().zip(&self.output) {
            *slice = IoSlice::new(piece);
        }
        let pieces = self.output.len().min(PIECES);
        let mut written = ready!(stream.as_mut().poll_write_vectored(cx, &slices[..pieces]))?;
        self.unflushed = true;
        self.said = Instant::now();
        while let Some(first) = self.output.front_mut().filter(|_| written > 0) {
            let part = first.len().min(written);
            first.advance(part);
            written -= part;
            if first.is_empty() {
                self.output.pop_front();
            }
        }
        Poll::Ready(Ok(true))
    }

    /// Ready when there is something to be said.
    fn look(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), LinkError>> {
        ready!(self.look.poll_tick(cx));
        let now = Instant::now();
        if now - self.heard >= IDLE_TIMEOUT {
            return Poll::Ready(Err(errors::timed_out(&self.remote)));
        }
        if now - self.said + LOOK_EVERY > KEEP_ALIVE {
            self.shared.lock().flow.ping();
        }
        Poll::Ready(Ok(()))
    }
}

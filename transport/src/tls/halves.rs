//! The two halves of a channel over TLS.

use std::future::poll_fn;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Poll, Waker};

use bytes::Bytes;

use super::NOT_SENT_BYTES;
use super::flow::{Flow, QUEUE_BYTES};
use crate::secure::{CLOSE_WAIT, WINDOW_BYTES};
use crate::{BoxFuture, ByteSink, ByteSource, Channel, LinkError, Peer};

/// A connection's state, as its task and its halves share it.
pub(super) struct Shared(Mutex<State>);

pub(super) struct State {
    pub(super) flow: Flow,
    sink: Option<Waker>,
    source: Option<Waker>,
    driver: Option<Waker>,
    /// The task has ended.
    gone: bool,
}

impl Shared {
    pub(super) fn new(flow: Flow) -> Arc<Self> {
        let state = State { flow, sink: None, source: None, driver: None, gone: false };
        Arc::new(Self(Mutex::new(state)))
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A channel to `peer`.
    pub(super) fn channel(self: &Arc<Self>, peer: Peer, remote: &str) -> Channel {
        Channel {
            peer,
            remote: remote.to_owned(),
            sink: Box::new(TlsSink(self.clone())),
            source: Box::new(TlsSource(self.clone())),
        }
    }
}

impl State {
    /// Has the halves look again, if there is something new for them.
    pub(super) fn wake_halves(&mut self) {
        if self.flow.sink_moves() || self.gone {
            wake(&mut self.sink);
        }
        if self.flow.source_moves() {
            wake(&mut self.source);
        }
    }

    /// The task looks again when a half did something.
    pub(super) fn wait(&mut self, driver: &Waker) {
        keep(&mut self.driver, driver);
    }

    pub(super) fn end(&mut self, why: LinkError) {
        self.flow.break_off(why);
        self.gone = true;
        self.wake_halves();
    }
}

fn wake(waker: &mut Option<Waker>) {
    if let Some(waker) = waker.take() {
        waker.wake();
    }
}

fn keep(kept: &mut Option<Waker>, waker: &Waker) {
    match kept {
        Some(kept) => kept.clone_from(waker),
        None => *kept = Some(waker.clone()),
    }
}

struct TlsSink(Arc<Shared>);

impl TlsSink {
    /// Waits until `ask` is answered.
    async fn until<T>(&self, mut ask: impl FnMut(&mut State) -> Option<T>) -> T {
        poll_fn(|cx| {
            let mut state = self.0.lock();
            match ask(&mut state) {
                Some(answer) => {
                    wake(&mut state.driver);
                    Poll::Ready(answer)
                }
                None => {
                    keep(&mut state.sink, cx.waker());
                    Poll::Pending
                }
            }
        })
        .await
    }
}

impl ByteSink for TlsSink {
    fn send(&mut self, bytes: Bytes) -> BoxFuture<'_, Result<(), LinkError>> {
        Box::pin(async move { self.until(|state| state.flow.send(&bytes)).await })
    }

    fn holds_bytes(&self) -> u64 {
        QUEUE_BYTES as u64 + u64::from(NOT_SENT_BYTES)
    }

    fn finish(&mut self) -> BoxFuture<'_, Result<(), LinkError>> {
        Box::pin(async {
            self.until(|state| Some(state.flow.finish())).await?;
            self.until(|state| state.flow.finished()).await
        })
    }

    fn close<'a>(&'a mut self, reason: &'a str) -> BoxFuture<'a, ()> {
        Box::pin(async {
            {
                let mut state = self.0.lock();
                state.flow.close(reason);
                state.wake_halves();
                wake(&mut state.driver);
            }
            // The peer may be gone: then there is nobody to wait for.
            let gone = self.until(|state| state.gone.then_some(()));
            let _ = tokio::time::timeout(CLOSE_WAIT, gone).await;
        })
    }
}

impl Drop for TlsSink {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.flow.drop_sink();
        wake(&mut state.driver);
    }
}

struct TlsSource(Arc<Shared>);

impl TlsSource {
    fn take(state: &mut State) -> Option<Bytes> {
        let piece = state.flow.take();
        if piece.is_some() && state.flow.has_words() {
            // The peer may send more.
            wake(&mut state.driver);
        }
        piece
    }
}

impl ByteSource for TlsSource {
    fn recv(&mut self) -> BoxFuture<'_, Result<Option<Bytes>, LinkError>> {
        Box::pin(poll_fn(|cx| {
            let mut state = self.0.lock();
            if let Some(piece) = Self::take(&mut state) {
                return Poll::Ready(Ok(Some(piece)));
            }
            if let Some(end) = state.flow.no_more() {
                return Poll::Ready(end.map(|()| None));
            }
            keep(&mut state.source, cx.waker());
            Poll::Pending
        }))
    }

    fn ready(&mut self) -> Option<Bytes> {
        Self::take(&mut self.0.lock())
    }

    fn widen(&self) -> Box<dyn FnOnce() + Send> {
        let shared = self.0.clone();
        Box::new(move || {
            let mut state = shared.lock();
            state.flow.widen(WINDOW_BYTES);
            wake(&mut state.driver);
        })
    }
}

impl Drop for TlsSource {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.flow.drop_source();
        wake(&mut state.driver);
    }
}

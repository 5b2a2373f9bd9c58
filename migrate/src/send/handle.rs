//! The hand that another thread has on a migration under way.

use std::sync::mpsc::Sender;
use std::sync::{Arc, Mutex, PoisonError};

use ferry_protocol::SourceEvent;

use super::{Message, Tuning};

/// Ends a migration, or changes it, from another thread.
#[derive(Clone, Debug, Default)]
pub struct SendHandle(Arc<Mutex<(bool, Option<Sender<Message>>)>>);

impl SendHandle {
    /// Cancels: before the commit the guest goes on here; after it nothing changes.
    pub fn cancel(&self) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        inner.0 = true;
        if let Some(sender) = &inner.1 {
            let _ = sender.send(Message::Event(SourceEvent::Cancel));
        }
    }

    /// Goes on as `tuning` says. After the commit, goals change nothing.
    pub fn tune(&self, tuning: Tuning) {
        let inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = &inner.1 {
            let _ = sender.send(Message::Tune(tuning));
        }
    }

    pub(super) fn attach(&self, sender: Sender<Message>) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if inner.0 {
            let _ = sender.send(Message::Event(SourceEvent::Cancel));
        }
        inner.1 = Some(sender);
    }
}

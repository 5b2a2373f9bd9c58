//! Post-copy of a machine of which this host keeps pages elsewhere than in memory: they came before the hand-over, as
//! the source kept them. One pager serves all pages, and these come from here.

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, PoisonError};

use ferry_memory::{Away, MemoryError};
use ferry_pager::{Faults, Notice, Pager};
use ferry_pages::{PAGE_BYTES, PageSet, Run};

use crate::install::Installer;
use crate::words;

/// Starts a pager for the pages of `owed` and for those that are with `away`, which are brought by a thread, those
/// that are waited for first. `notify` hears of all others.
pub(crate) fn start(
    installer: &Arc<Installer>,
    away: &Arc<dyn Away>,
    owed: PageSet,
    notify: impl Fn(Notice) + Send + Sync + 'static,
) -> Result<(Pager, Faults), MemoryError> {
    owed.runs().for_each(|run| away.forget(run));
    let kept = away.pages();
    let mut all = owed;
    all.union_with(&kept);
    let (wanted, to_bring) = channel();
    let (wanted, notify) = (Mutex::new(wanted), Arc::new(notify));
    let (of_kept, tell) = (kept.clone(), notify.clone());
    let split = move |notice| match notice {
        Notice::Ask(gfns) => {
            let (here, there): (Vec<_>, Vec<_>) =
                gfns.into_iter().partition(|gfn| of_kept.contains(*gfn));
            let wanted = wanted.lock().unwrap_or_else(PoisonError::into_inner);
            // The thread ends when all are here.
            for gfn in here {
                let _ = wanted.send(gfn);
            }
            if !there.is_empty() {
                tell(Notice::Ask(there));
            }
        }
        other => tell(other),
    };
    let started = Pager::start(&installer.view().plain(), all, split)?;
    if let Some(first) = kept.first() {
        let (installer, away) = (installer.clone(), away.clone());
        let thread = std::thread::Builder::new().name("ferry-kept".into());
        thread
            .spawn(move || {
                if let Err(why) = bring(&installer, away.as_ref(), &kept, &to_bring) {
                    notify(Notice::Broken(why));
                }
            })
            .map_err(|source| MemoryError::Refused {
                what: "start a thread to bring swapped pages back,",
                run: Run::new(first, 1),
                source,
            })?;
    }
    Ok(started)
}

/// Brings the pages of `kept`, those that are `wanted` first.
fn bring(
    installer: &Installer,
    away: &dyn Away,
    kept: &PageSet,
    wanted: &Receiver<u64>,
) -> Result<(), String> {
    let mut page = [0; PAGE_BYTES];
    let mut bring = |gfn| -> Result<(), String> {
        // Not there: it was brought before, or the guest gave it up.
        while away.read(gfn, &mut page).map_err(|e| words(&e))? {
            // Without a pager, all is over.
            let installed = installer.pager(|pager| pager.install(gfn, &page, |_| ()));
            installed.unwrap_or(Ok(())).map_err(|e| words(&e))?;
            away.forget(Run::new(gfn, 1));
        }
        Ok(())
    };
    for gfn in kept.runs().flat_map(|run| run.start..run.end()) {
        while let Ok(gfn) = wanted.try_recv() {
            bring(gfn)?;
        }
        bring(gfn)?;
    }
    Ok(())
}

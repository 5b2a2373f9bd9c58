//! Processes under test: what they say, how they end, and that none is left behind.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// What takes longer than this hangs.
pub const HANG: Duration = Duration::from_secs(180);

/// A process that is killed when this is dropped.
#[derive(Debug)]
pub struct Running {
    child: Child,
    words: String,
    stderr: Arc<Lines>,
    stdout: Option<JoinHandle<Vec<u8>>>,
}

/// The lines that a process wrote so far.
#[derive(Debug, Default)]
struct Lines {
    inner: Mutex<(Vec<String>, bool)>,
    more: Condvar,
}

impl Lines {
    fn lock(&self) -> MutexGuard<'_, (Vec<String>, bool)> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What a command that ended said.
#[derive(Debug)]
pub struct Done {
    /// Exit status; none if a signal ended it.
    pub status: Option<i32>,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Done {
    /// Insists on exit status 0.
    #[track_caller]
    pub fn succeeded(self) -> Self {
        assert_eq!(self.status, Some(0), "{self:?}");
        self
    }

    /// Insists on exit status 1 and one line of standard error with these words, in any case of letters.
    #[track_caller]
    pub fn failed(&self, words: &[&str]) {
        assert_eq!(self.status, Some(1), "{self:?}");
        let line = self.stderr.trim_end();
        assert!(line.starts_with("ferry: ") && !line.contains('\n'), "{self:?}");
        for word in words {
            assert!(
                line.to_lowercase().contains(&word.to_lowercase()),
                "`{word}` is not in: {line}"
            );
        }
    }

    /// Standard output as JSON.
    #[track_caller]
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

impl Running {
    /// Starts `command`; `args` name it in messages.
    pub(crate) fn start(mut command: Command, args: &[&str]) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap_or_else(|e| panic!("{command:?}: {e}"));
        let mut out = child.stdout.take().expect("a pipe");
        let stdout = std::thread::spawn(move || {
            let mut bytes = Vec::new();
            // What came before an error is kept.
            let _ = out.read_to_end(&mut bytes);
            bytes
        });
        let err = BufReader::new(child.stderr.take().expect("a pipe"));
        let stderr = Arc::new(Lines::default());
        let lines = stderr.clone();
        std::thread::spawn(move || {
            for line in err.lines().map_while(Result::ok) {
                lines.lock().0.push(line);
                lines.more.notify_all();
            }
            lines.lock().1 = true;
            lines.more.notify_all();
        });
        Self { child, words: args.join(" "), stderr, stdout: Some(stdout) }
    }

    /// Waits for a line of standard error, of now or before, that contains `words`, and returns it.
    #[track_caller]
    pub fn line(&self, words: &str) -> String {
        let began = Instant::now();
        let mut lines = self.stderr.lock();
        loop {
            if let Some(line) = lines.0.iter().find(|l| l.contains(words)) {
                return line.clone();
            }
            let said = || format!("`{}` did not say `{words}`: {:#?}", self.words, lines.0);
            assert!(!lines.1, "{}", said());
            assert!(began.elapsed() < HANG, "{}", said());
            let waited = self.stderr.more.wait_timeout(lines, Duration::from_secs(1));
            lines = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Whether it was said so far.
    pub fn has_said(&self, words: &str) -> bool {
        self.stderr.lock().0.iter().any(|l| l.contains(words))
    }

    /// Whether it still runs.
    pub fn is_alive(&mut self) -> bool {
        self.child.try_wait().expect("a child can be waited for").is_none()
    }

    /// Its process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.child), signal).expect("a child can be signalled");
    }

    /// Kills it, as `kill -9` does.
    pub fn kill(mut self) {
        self.child.kill().expect("a child can be killed");
        self.child.wait().expect("a child can be waited for");
    }

    /// Waits until it ends by itself.
    #[track_caller]
    pub fn end(mut self) -> Done {
        let began = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child can be waited for") {
                break status;
            }
            assert!(
                began.elapsed() < HANG,
                "`{}` does not end: {:#?}",
                self.words,
                self.stderr.lock().0
            );
            std::thread::sleep(Duration::from_millis(10));
        };
        let stdout = self.stdout.take().and_then(|t| t.join().ok()).unwrap_or_default();
        let mut lines = self.stderr.lock();
        while !lines.1 {
            lines = self.stderr.more.wait(lines).unwrap_or_else(PoisonError::into_inner);
        }
        let mut stderr = lines.0.join("\n");
        if !stderr.is_empty() {
            stderr.push('\n');
        }
        Done {
            status: status.code(),
            stdout: String::from_utf8_lossy(&stdout).into_owned(),
            stderr,
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

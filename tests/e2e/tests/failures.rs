//! What goes wrong is said in words, and where there is a machine it runs on.

use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ferry_e2e::{Done, Host, Hosts, Running, kvm, network, path, wait_for};
use ferry_transport::pki::{Validity, init_for};
use rustix::process::Signal;

const PROCESS: &str = ":process";
/// Rounds of 9 MiB that come dirty at once: at `SLOW` each takes longer than the link's idle time-out.
const ENDLESS: &str = "pattern=working-set set=9M rate=20000 random=100";
const SLOW: [&str; 4] = ["--bandwidth", "8Mbit", "--rejoin", "1s"];

/// A machine `m` that never gets ready to move at `SLOW`, and a destination.
fn set_out() -> (Hosts, Running, Running, SocketAddr) {
    set_out_with(ENDLESS)
}

fn set_out_with(cmdline: &str) -> (Hosts, Running, Running, SocketAddr) {
    let hosts = Hosts::new();
    let (receiver, to) = hosts.destination.receive(&[]);
    let runner = hosts.source.boot("m", PROCESS, &["--cmdline", cmdline]);
    (hosts, runner, receiver, to)
}

/// Insists that a migration in plain words failed, why, and that the machine runs on.
#[track_caller]
fn stays(hosts: &Hosts, done: &Done, words: &[&str]) {
    assert_eq!(done.status, Some(1), "{done:?}");
    assert!(done.stdout.contains("`m` goes on here: the move failed"), "{done:?}");
    for word in words {
        assert!(done.stdout.contains(word), "`{word}` is not in {done:?}");
    }
    hosts.source.works("m");
}

/// Insists that `m` can be moved now.
#[track_caller]
fn moves(hosts: &Hosts, to: SocketAddr) {
    hosts.source.migrate("m", to, &[]).completed();
    hosts.destination.works("m");
}

fn file(hosts: &Hosts, name: &str, content: &[u8]) -> PathBuf {
    let path = hosts.path(name);
    std::fs::write(&path, content).expect("a file");
    path
}

#[test]
fn a_machine_that_cannot_be_made_is_refused_in_words() {
    let hosts = Hosts::new();
    let text = file(&hosts, "text", b"this is no kernel\n");
    let empty = file(&hosts, "empty", b"");
    let mut cases: Vec<(&[&str], &[&str])> = vec![
        (&["--kernel", PROCESS, "--memory", "4K"], &["memory", "4096 bytes"]),
        (&["--kernel", PROCESS, "--cpus", "0"], &["not 0"]),
        (&["--kernel", PROCESS, "--cmdline", "speed=1"], &["speed=1", "parameters are", "rate"]),
        (&["--kernel", PROCESS, "--dirty-log", "ring"], &["--dirty-log", "write-protect"]),
    ];
    let (text, empty) = (path(&text), path(&empty));
    let on_kvm: [(&[&str], &[&str]); 9] = [
        (&["--kernel", text], &[text, "not a kernel", "PVH", "bzImage"]),
        (&["--kernel", empty], &[empty, "not a kernel", "empty"]),
        (&["--kernel", "/nowhere/vmlinux"], &["kernel /nowhere/vmlinux", "No such file"]),
        (
            &["--kernel", ":guest", "--initrd", "/nowhere/initrd"],
            &["initrd /nowhere/initrd", "No such file"],
        ),
        (
            &["--kernel", ":guest", "--serial", "/nowhere/console"],
            &["serial output /nowhere/console"],
        ),
        (&["--kernel", ":guest", "--memory", "1M"], &["memory of 1048576 bytes", "2097152"]),
        (&["--kernel", ":guest", "--cpus", "0"], &["vCPUs", "not 0"]),
        (&["--kernel", ":guest", "--cpus", "100000"], &["vCPUs", "not 100000"]),
        (&["--kernel", ":guest", "--cmdline", "speed=1"], &["speed=1", "parameters are", "rate"]),
    ];
    if kvm() {
        cases.extend(on_kvm);
    }
    for (args, words) in cases {
        hosts.source.run(&[&["vm", "run", "m"], args].concat()).failed(words);
    }
    assert!(hosts.source.machines().is_empty());
}

#[test]
fn memory_too_small_for_the_kernel_is_told_with_both_sizes() {
    if !kvm() {
        return;
    }
    // The test guest's own ELF, made to claim that it takes 32 MiB more: p_memsz of each PT_LOAD.
    let mut elf = ferry_guest::ELF.to_vec();
    let word =
        |elf: &[u8], at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().expect("8 bytes"));
    let half = |elf: &[u8], at: usize| usize::from(u16::from_le_bytes([elf[at], elf[at + 1]]));
    let table = usize::try_from(word(&elf, 32)).expect("an offset");
    for n in 0..half(&elf, 56) {
        let at = table + n * half(&elf, 54);
        if elf[at..at + 4] == [1, 0, 0, 0] {
            let size = word(&elf, at + 40) + (32 << 20);
            elf[at + 40..at + 48].copy_from_slice(&size.to_le_bytes());
        }
    }
    let hosts = Hosts::new();
    let kernel = file(&hosts, "large", &elf);
    let args = ["vm", "run", "m", "--kernel", path(&kernel), "--memory", "16M"];
    hosts.source.run(&args).failed(&[
        "needs",
        "bytes of memory, the machine has 16777216",
        "more memory",
    ]);
}

#[test]
fn a_name_is_taken_once_on_each_host() {
    let (hosts, _runner, receiver, to) = set_out_with(ferry_e2e::BUSY);
    hosts.source.run(&["vm", "run", "m", "--kernel", PROCESS]).failed(&["name `m` is taken"]);
    let _other = hosts.destination.boot("m", PROCESS, &[]);
    hosts.source.migrate("m", to, &[]).stayed("refused", &["name `m` is taken"]);
    receiver.line("did not come");
    hosts.source.works("m");
    hosts.destination.works("m");
    let identity = path(&hosts.destination.identity);
    let args = ["receive", "--listen", "127.0.0.1:0", "--identity", identity, "--name", "m"];
    hosts.destination.run(&args).failed(&["name `m` is taken"]);
    hosts.destination.run(&["vm", "stop", "m"]).succeeded();
    wait_for("the name is free", || hosts.destination.machines().is_empty().then_some(()));
    moves(&hosts, to);
}

#[test]
fn a_machine_that_is_not_there_or_cannot_be_is_named() {
    let hosts = Hosts::new();
    let identity = path(&hosts.source.identity);
    let migrate = |name| ["migrate", name, "--to", "127.0.0.1:9", "--identity", identity];
    let words = ["no machine `nobody`", "ferry vm list"];
    for command in ["show", "pause", "resume", "stop"] {
        hosts.source.run(&["vm", command, "nobody"]).failed(&words);
        hosts
            .source
            .run(&["vm", command, "../m"])
            .failed(&["`../m` cannot name a machine", "letters"]);
    }
    hosts.source.run(&["cancel", "nobody"]).failed(&words);
    hosts.source.run(&migrate("nobody")).failed(&words);
    hosts.source.run(&migrate("../m")).failed(&["cannot name a machine"]);
    for bad in ["../m", "", ".m", "-m", "a b", &"m".repeat(65)] {
        let done = hosts.source.run(&["vm", "run", "--kernel", PROCESS, "--", bad]);
        done.failed(&["cannot name a machine"]);
    }
    // Scripts get an object here as well.
    let none = hosts.source.migrate("nobody", "127.0.0.1:9".parse().expect("an address"), &[]);
    assert_eq!(none.report["outcome"], "failed");
    assert!(none.reason().contains("no machine `nobody`") && none.status == Some(1), "{none:?}");
}

#[test]
fn an_address_that_cannot_be_had_is_named() {
    let hosts = Hosts::new();
    let (_receiver, taken) = hosts.source.receive(&[]);
    let listen = |addr: &str, serial: &str| {
        let identity = path(&hosts.destination.identity);
        hosts.destination.run(&[
            "receive",
            "--listen",
            addr,
            "--identity",
            identity,
            "--serial",
            serial,
        ])
    };
    let taken = taken.to_string();
    listen(&taken, "/dev/null").failed(&["address is in use", &taken]);
    // 192.0.2.0/24 is for documentation (RFC 5737): nobody's.
    listen("192.0.2.1:7000", "/dev/null").failed(&["192.0.2.1:7000", "cannot open a UDP socket"]);
    listen("127.0.0.1:0", "/nowhere/console").failed(&["serial output /nowhere/console"]);
    for bad in ["127.0.0.1", "7000", "127.0.0.1:99999"] {
        let done = listen(bad, "/dev/null");
        assert_eq!(done.status, Some(2), "{done:?}");
        assert!(done.stderr.contains("HOST:PORT"), "{done:?}");
    }
}

#[test]
fn a_peer_that_says_nothing_is_told_from_one_that_speaks_something_else() {
    let hosts = Hosts::new();
    let _runner = hosts.source.boot("m", PROCESS, &[]);
    let silent = UdpSocket::bind("127.0.0.1:0").expect("a socket");
    let to = silent.local_addr().expect("an address");
    let moved = hosts.source.migrate("m", to, &[]);
    moved.stayed("failed", &["nothing speaks QUIC", &to.to_string(), "ferry receive"]);
    hosts.source.works("m");

    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let other = runtime.block_on(async { stranger(&hosts.destination.identity) });
    let to = other.local_addr().expect("an address");
    let accepting = other.clone();
    runtime.spawn(async move {
        while let Some(peer) = accepting.accept().await {
            drop(peer.await)
        }
    });
    let moved = hosts.source.migrate("m", to, &[]);
    moved.stayed("failed", &["speaks QUIC but not Ferry's protocol"]);
    hosts.source.works("m");
}

/// A QUIC server with a certificate of the authority, for another protocol.
fn stranger(identity: &Path) -> quinn::Endpoint {
    use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
    let cert = CertificateDer::from_pem_file(identity.join("cert.pem")).expect("a certificate");
    let key = PrivateKeyDer::from_pem_file(identity.join("key.pem")).expect("a key");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("ring has TLS 1.3")
        .with_no_client_auth()
        .with_single_cert(vec![cert], key)
        .expect("they belong together");
    tls.alpn_protocols = vec![b"h3".to_vec()];
    let crypto = quinn::crypto::rustls::QuicServerConfig::try_from(tls).expect("fit for QUIC");
    let config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    quinn::Endpoint::server(config, "127.0.0.1:0".parse().expect("an address")).expect("a socket")
}

#[test]
fn only_hosts_of_the_same_authority_and_in_time_take_part() {
    let (hosts, _runner, receiver, to) = set_out_with(ferry_e2e::BUSY);
    let day = Duration::from_secs(86_400);
    let past = Validity { from: SystemTime::now() - 10 * day, authority: 3652 * day, host: day };
    init_for(&hosts.path("pki"), &["old".to_owned()], &past).expect("an identity");
    init_for(&hosts.path("other"), &["a".to_owned()], &Validity::default()).expect("an authority");
    let (old, other) = (hosts.path("pki/old"), hosts.path("other/a"));
    let (nowhere, root) = (hosts.path("nowhere"), hosts.path("pki"));

    let cases: [(&Path, &[&str]); 4] = [
        (&other, &["another authority", "ferry pki init"]),
        (&old, &["expired on", "ferry pki init"]),
        (&nowhere, &["no identity at", "nowhere", "ferry pki init"]),
        (&root, &["cert.pem is missing", "a host's folder"]),
    ];
    for (identity, words) in cases {
        let moved = hosts.source.migrate("m", to, &["--identity", path(identity)]);
        moved.stayed("failed", words);
        hosts.source.works("m");
        if identity != other {
            let done = hosts.source.run(&[
                "receive",
                "--listen",
                "127.0.0.1:0",
                "--identity",
                path(identity),
            ]);
            done.failed(words);
        }
    }
    assert!(!receiver.has_said("is coming from"), "a stranger's machine was announced");

    let stranger = Host { identity: other, ..hosts.destination.clone() };
    let (_receiver, strange) = stranger.receive(&[]);
    hosts.source.migrate("m", strange, &[]).stayed("failed", &["another authority"]);
    moves(&hosts, to);
}

#[test]
fn a_destination_with_less_memory_refuses_and_says_how_much_it_has() {
    let hosts = Hosts::new();
    let (receiver, to) = hosts.destination.receive(&[]);
    let figures = std::fs::read_to_string("/proc/meminfo").expect("memory figures");
    let total = figures.lines().find_map(|l| l.strip_prefix("MemTotal:")).expect("a total");
    let kib: u64 = total.trim().trim_end_matches(" kB").parse().expect("a number");
    let size = format!("{}K", kib * 2);
    // Only what it touches is there.
    let cmdline = "pattern=working-set set=4M rate=1000 arena=4M";
    let _runner = hosts.source.boot("m", PROCESS, &["--memory", &size, "--cmdline", cmdline]);
    let has = format!("{} MiB", kib >> 9);
    hosts.source.migrate("m", to, &[]).stayed("refused", &[&has, "this host can take"]);
    receiver.line("did not come");
    hosts.source.works("m");
}

#[test]
fn a_destination_without_kvm_refuses_a_kvm_machine() {
    if !kvm() {
        return;
    }
    let mut hosts = Hosts::new();
    let hidden = "mount --bind /dev/null /dev/kvm && exec \"$@\"";
    let unshare = ["unshare", "--mount", "sh", "-c", hidden, "sh"].map(str::to_owned);
    let tried = std::process::Command::new(&unshare[0]).args(&unshare[1..]).arg("true").output();
    if let Some(why) = network::why_not(tried) {
        println!("SKIP: /dev/kvm cannot be hidden from a process: {why}");
        return;
    }
    hosts.destination.before = unshare.into();
    let (_receiver, to) = hosts.destination.receive(&[]);
    let _runner = hosts.source.boot("m", ":guest", &[]);
    hosts.source.migrate("m", to, &[]).stayed("refused", &["KVM"]);
    hosts.source.works("m");
    // What needs no KVM is welcome.
    let _process = hosts.source.boot("p", PROCESS, &[]);
    hosts.source.migrate("p", to, &[]).completed();
}

/// The destination dies as soon as the source has said `words`.
fn destination_dies_when(words: &str, more: &[&str]) {
    let (hosts, _runner, receiver, to) = set_out();
    let moving = hosts.source.start_migrate("m", to, &[&SLOW[..], more].concat());
    moving.line(words);
    receiver.kill();
    stays(&hosts, &moving.end(), &[&to.to_string()]);
    // The name that it left behind is free.
    let (_receiver, to) = hosts.destination.receive(&[]);
    moves(&hosts, to);
}

#[test]
fn a_destination_that_dies_before_the_first_page_leaves_the_machine_running() {
    destination_dies_when("the destination takes the machine", &[]);
}

#[test]
fn a_destination_that_dies_in_the_first_round_leaves_the_machine_running() {
    destination_dies_when("round 1: ", &[]);
}

#[test]
fn a_destination_that_dies_in_a_later_round_leaves_the_machine_running() {
    destination_dies_when("round 2: ", &[]);
}

#[test]
fn a_destination_that_dies_while_the_last_pages_are_sent_leaves_the_machine_running() {
    // So long a stop is allowed that the last pages take more than the link's idle time-out.
    destination_dies_when("the guest stands still", &["--max-downtime", "2m"]);
}

#[test]
fn a_destination_that_freezes_is_given_up_and_takes_machines_when_it_is_back() {
    let (hosts, _runner, receiver, to) = set_out();
    let moving = hosts.source.start_migrate("m", to, &SLOW);
    moving.line("round 1: ");
    receiver.signal(Signal::STOP);
    stays(&hosts, &moving.end(), &["was not heard from for"]);
    // Frozen from the beginning, it is as nobody.
    hosts.source.migrate("m", to, &[]).stayed("failed", &["nothing speaks QUIC"]);
    hosts.source.works("m");
    receiver.signal(Signal::CONT);
    receiver.line("did not come");
    moves(&hosts, to);
}

#[test]
fn a_source_that_dies_leaves_nothing_at_the_destination() {
    let (hosts, runner, receiver, to) = set_out();
    let moving = hosts.source.start_migrate("m", to, &SLOW);
    moving.line("round 1: ");
    runner.kill();
    let done = moving.end();
    assert_eq!(done.status, Some(1), "{done:?}");
    assert!(done.stderr.contains("`m` ended during the migration: look at both hosts"), "{done:?}");
    receiver.line("machine `m` did not come");
    assert!(hosts.destination.machines().is_empty() && hosts.source.machines().is_empty());
    let _again = hosts.source.boot("m", PROCESS, &[]);
    moves(&hosts, to);
}

#[test]
fn a_client_that_dies_does_not_end_the_migration() {
    let (hosts, runner, receiver, to) = set_out_with(ferry_e2e::BUSY);
    let moving = hosts.source.start_migrate("m", to, &SLOW);
    moving.line("round 1: ");
    moving.kill();
    receiver.line("its memory is the same");
    hosts.destination.works("m");
    runner.end().succeeded();
}

/// The last pages take seconds, but fewer than the link's idle time-out.
const SHORT_STOP: &str = "pattern=working-set set=3M rate=20000 random=100";

/// A machine whose destination froze so late that the source sends the run permit to nobody.
fn doubtful() -> (Hosts, Running, Running, Running, SocketAddr) {
    let (hosts, runner, receiver, to) = set_out_with(SHORT_STOP);
    let more = ["--max-downtime", "2m"];
    let moving = hosts.source.start_migrate("m", to, &[&SLOW[..], &more].concat());
    moving.line("the guest stands still");
    receiver.signal(Signal::STOP);
    moving.line("the run permit is on its way");
    moving.line("asking the destination what became of the machine");
    (hosts, runner, receiver, moving, to)
}

#[test]
fn a_machine_in_doubt_stays_paused_until_the_operator_knows() {
    let (hosts, _runner, receiver, moving, to) = doubtful();
    let done = moving.end();
    assert_eq!(done.status, Some(1), "{done:?}");
    assert!(done.stdout.contains("DID NOT ARRIVE and stays paused here"), "{done:?}");
    assert_eq!(hosts.source.state("m"), "paused in doubt");
    let checked = hosts.source.checked("m");
    let words = ["--destination-is-dead", "ferry vm stop m"];
    hosts.source.run(&["vm", "resume", "m"]).failed(&words);
    hosts.source.run(&["vm", "pause", "m"]).failed(&words);
    let again = hosts.source.migrate("m", to, &[]);
    assert_eq!(again.report["machine"], "paused_at_source", "{again:?}");
    assert!(again.reason().contains(words[0]) && again.status == Some(1), "{again:?}");
    assert_eq!(hosts.source.checked("m"), checked, "it stands still");
    receiver.kill();
    hosts.source.run(&["vm", "resume", "m", "--destination-is-dead"]).succeeded();
    hosts.source.works("m");
    let (_receiver, to) = hosts.destination.receive(&[]);
    moves(&hosts, to);
}

#[test]
fn a_destination_that_wakes_in_time_settles_the_doubt_and_one_machine_runs() {
    let (hosts, _runner, receiver, moving, _to) = doubtful();
    receiver.signal(Signal::CONT);
    let done = moving.end();
    let arrived = hosts.destination.show("m").is_some();
    if done.status == Some(0) {
        assert!(arrived && hosts.source.machines().is_empty(), "{done:?}");
        hosts.destination.works("m");
    } else {
        assert!(!arrived, "{done:?}");
        stays(&hosts, &done, &[]);
    }
}

fn in_namespaces() -> Option<(network::Network, Hosts, Running, SocketAddr)> {
    let network = network::Network::new()?;
    let mut hosts = Hosts::new();
    hosts.source.before = network.at(0);
    hosts.destination.before = network.at(1);
    let (receiver, to) = hosts.destination.receive_on(&format!("{}:0", network::ADDRESSES[1]), &[]);
    Some((network, hosts, receiver, to))
}

#[test]
fn a_link_that_is_cut_mid_round_and_mended_costs_time_and_nothing_else() {
    let Some((network, hosts, receiver, to)) = in_namespaces() else { return };
    let _runner = hosts.source.boot("m", PROCESS, &["--cmdline", ferry_e2e::BUSY]);
    let moving = hosts.source.start_migrate("m", to, &["--bandwidth", "16Mbit"]);
    moving.line("round 1: ");
    network.set_link("down");
    moving.line("trying to come back");
    receiver.line("What came is kept");
    hosts.source.works("m");
    network.set_link("up");
    let done = moving.end().succeeded();
    for word in ["the same on both sides", "lost 1 times"] {
        assert!(done.stdout.contains(word), "`{word}` is not in {done:?}");
    }
    hosts.destination.works("m");
}

#[test]
fn a_link_that_is_cut_mid_round_for_good_leaves_the_machine_running() {
    let Some((network, hosts, receiver, to)) = in_namespaces() else { return };
    let _runner = hosts.source.boot("m", PROCESS, &["--cmdline", ENDLESS]);
    let moving = hosts.source.start_migrate("m", to, &SLOW);
    moving.line("round 1: ");
    network.set_link("down");
    stays(&hosts, &moving.end(), &["was not heard from for", "could not be reached for 1 s"]);
    receiver.line("did not come");
    hosts.source.migrate("m", to, &[]).stayed("failed", &["nothing speaks QUIC"]);
    network.set_link("up");
    moves(&hosts, to);
}

//! What goes wrong is said in words, and where there is a machine it runs on.

use std::net::{SocketAddr, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use ferry_e2e::{Host, Hosts, Running, kvm, network, path, wait_for};
use ferry_transport::pki::{Validity, init_for};

const PROCESS: &str = ":process";

/// A machine `m`, and a destination.
fn set_out() -> (Hosts, Running, Running, SocketAddr) {
    let hosts = Hosts::new();
    let (receiver, to) = hosts.destination.receive(&[]);
    let runner = hosts.source.boot("m", PROCESS, &[]);
    (hosts, runner, receiver, to)
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
    let (hosts, _runner, receiver, to) = set_out();
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
    let none = hosts.source.migrate("nobody", "127.0.0.1:9", &[]);
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
    let (hosts, _runner, receiver, to) = set_out();
    let day = Duration::from_secs(86_400);
    let past = Validity { from: SystemTime::now() - 10 * day, authority: 3652 * day, host: day };
    init_for(&hosts.path("pki"), &["old".to_owned()], &past).expect("an identity");
    init_for(&hosts.path("other"), &["a".to_owned()], &Validity::default()).expect("an authority");
    let (old, other) = (hosts.path("pki/old"), hosts.path("other/a"));
    let (nowhere, root) = (hosts.path("nowhere"), hosts.path("pki"));

    let cases: [(&Path, &[&str]); 4] = [
        (&other, &["another authority", "ferry pki init"]),
        (&old, &["expired on", "ferry pki renew"]),
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

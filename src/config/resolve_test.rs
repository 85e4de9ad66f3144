//! Every rule of `resolve.rs`, as text in and text out.

use std::io;

use super::*;
use crate::base::AccountId;
use crate::config::file::LogFormat;

/// 2026-11-22 00:00:00 UTC.
const NOW: Millis = Millis(1_795_305_600_000);
const HASH: &str = "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08";

fn machine(run: impl FnOnce(&Surroundings) -> Result<Config>) -> Result<Config> {
    let variable = |name: &str| match name {
        "TOKEN" => Some("a-token-long-enough-to-keep".to_owned()),
        "SHORT" => Some("test".to_owned()),
        "PADDED" => Some("a-token-long-enough-to-keep\n".to_owned()),
        "CREDENTIALS_DIRECTORY" => Some("/run/credentials".to_owned()),
        _ => None,
    };
    let text = |path: &Path| match path.to_str().unwrap() {
        "/etc/neurond/tokens.toml" | "/run/credentials/tokens.toml" => {
            Ok(format!("[[token]]\nid = \"file\"\nsha256 = \"{HASH}\"\naccount = \"x\"\n"))
        }
        "/etc/neurond/broken.toml" => Ok("[[token]\n".into()),
        "/etc/neurond/more.toml" => {
            Ok("[[model]]\nid = \"mine\"\ncontext = 100\nfree = true\naliases = [\"my\"]\n".into())
        }
        "/etc/neurond/bad.toml" => Ok("[[model]]\nid = \"mine\"\n".into()),
        _ => Err(io::ErrorKind::NotFound.into()),
    };
    let modified = |path: &Path| match path.to_str().unwrap() {
        "/etc/neurond/a.gguf" | "/m/b.gguf" => Ok(Millis(7)),
        _ => Err(io::ErrorKind::NotFound.into()),
    };
    run(&Surroundings {
        cpus: 16,
        cores: 8,
        memory: 16 << 30,
        now: NOW,
        variable: &variable,
        text: &text,
        modified: &modified,
    })
}

fn with(text: &str, overrides: &Overrides) -> Result<Config> {
    let file: File = toml::from_str(text).unwrap_or_else(|error| panic!("{text}\n{error}"));
    machine(|machine| resolve(Some(Path::new("/etc/neurond/neurond.toml")), file, overrides, machine))
}

fn good(text: &str) -> Config {
    with(text, &Overrides::default()).unwrap_or_else(|error| panic!("{text}\n{error}"))
}

/// Refused with exactly one line that begins with the file and contains `wanted`.
fn refused(text: &str, wanted: &str) {
    let error = with(text, &Overrides::default()).map(|_| ()).expect_err(text);
    let said = error.message();
    assert!(said.starts_with("/etc/neurond/") && said.contains(wanted), "{text}\n{said}");
    assert_eq!(said.lines().count(), 1, "{text}\n{said}");
}

fn warned(text: &str, wanted: &str) {
    let warnings = good(text).warnings;
    assert!(warnings.iter().any(|sentence| sentence.contains(wanted)), "{text}\n{warnings:?}");
}

const MODEL: &str = "[[model]]\nid = \"smollm2-135m-instruct\"\npath = \"a.gguf\"\n";

#[test]
fn how_a_gpu_keeps_a_model_follows_from_its_name_unless_it_is_written() {
    let packing = |id: &str, more: &str| {
        good(&format!("[[model]]\nid = {id:?}\npath = \"a.gguf\"\n{more}")).models[0].on_gpu.weights
    };
    assert_eq!(packing("@cf/meta/llama-3.1-8b-instruct", ""), Packing::Bf16);
    assert_eq!(packing("@cf/meta/llama-3.1-8b-instruct-fp8-fast", ""), Packing::Fp8);
    assert_eq!(packing("@cf/meta/llama-3.1-8b-instruct-awq", ""), Packing::Q4);
    assert_eq!(packing("@cf/meta/llama-3.1-8b-instruct-awq", "gpu_weights = \"bf16\""), Packing::Bf16);
}

#[test]
fn gpus_serve_what_has_kernels_for_them_and_is_not_kept_from_them() {
    let check = |id: &str, more: &str, expected: bool| {
        let config = good(&format!("[[model]]\nid = {id:?}\npath = \"a.gguf\"\n{more}"));
        assert_eq!(config.models[0].is_for_gpus(), expected, "{id} {more}");
    };
    for id in ["smollm2-135m-instruct", "@cf/baai/bge-m3", "@cf/baai/bge-reranker-base"] {
        check(id, "", true);
        check(id, "gpus = [1]", true);
        check(id, "gpus = []", false);
        check(id, "precision = \"plain\"", false);
    }
    check("@cf/black-forest-labs/flux-1-schnell", "", false);
}

#[test]
fn an_empty_file_is_a_whole_configuration() {
    let config = good("");
    assert_eq!(config.server.listen.to_string(), "127.0.0.1:8080");
    assert_eq!((config.server.workers, config.engine.threads), (4, 8));
    assert_eq!(config.server.drain_timeout, Duration::from_secs(30));
    assert_eq!((config.engine.step_tokens, config.engine.block_tokens), (512, 16));
    assert_eq!(config.auth, Auth { anonymous: None, tokens: vec![] });
    assert_eq!(config.binding, None);
    assert_eq!(config.warnings.len(), 2, "nobody may call, nothing is served: {:?}", config.warnings);
}

#[test]
fn without_a_file_this_machine_is_served_without_a_token() {
    let config = machine(|machine| resolve(None, File::builtin(), &Overrides::default(), machine)).unwrap();
    assert_eq!(config.auth.anonymous, Some(AccountId::new("local")));
    assert!(config.server.listen.ip().is_loopback());
    let remote = Overrides { listen: Some("0.0.0.0:80".into()), ..Overrides::default() };
    let refused = machine(|machine| resolve(None, File::builtin(), &remote, machine)).unwrap_err();
    assert!(refused.message().starts_with("(no file): auth.anonymous = \"local\" on 0.0.0.0:80: "), "{refused}");
}

#[test]
fn models_get_their_catalog_id_their_path_and_a_pool_that_fits_the_machine() {
    let config = good(MODEL);
    let model = &config.models[0];
    assert_eq!(model.id.as_str(), "@cf/huggingfacetb/smollm2-135m-instruct");
    assert_eq!(model.path, Path::new("/etc/neurond/a.gguf"));
    assert_eq!((model.kv_bytes, model.context, model.modified), (2 << 30, 8192, Some(Millis(7))));

    let sized = good(&format!("{MODEL}kv_bytes = \"96MiB\"\ncontext = 2048\nprecision = \"plain\"\nkv = \"f32\"\n"));
    assert_eq!((sized.models[0].kv_bytes, sized.models[0].context), (96 << 20, 2048));

    let two = good(&format!("{MODEL}[[model]]\nid = \"@cf/qwen/qwq-32b\"\npath = \"/m/b.gguf\"\n"));
    assert_eq!(two.models.iter().map(|m| m.kv_bytes).collect::<Vec<_>>(), [2 << 30, 2 << 30]);
    assert_eq!(two.models[1].path, Path::new("/m/b.gguf"));
}

#[test]
fn a_model_brings_its_own_entry_or_changes_a_known_one() {
    let entry = "entry = { context = 100, price = { input = 1, output = 2 } }";
    let config = good(&format!("[[model]]\nid = \"mine\"\npath = \"a.gguf\"\n{entry}\n"));
    assert_eq!(config.catalog.resolve("mine").unwrap().price, Price::tokens(1, 2));

    let config = good(&format!("{MODEL}entry = {{ price = {{ input = 9 }} }}\n"));
    let known = config.catalog.resolve("smollm2-135m-instruct").unwrap();
    assert_eq!((known.price.input, known.context), (9, 8192));

    let extra = good("[catalog]\npath = \"more.toml\"\n[[model]]\nid = \"my\"\npath = \"a.gguf\"\n");
    assert_eq!(extra.models[0].id.as_str(), "mine");
    refused("[catalog]\npath = \"none.toml\"\n", "catalog.path = /etc/neurond/none.toml: cannot be read");
    let two = with("[catalog]\npath = \"bad.toml\"\n", &Overrides::default()).unwrap_err();
    assert!(two.message().starts_with("/etc/neurond/bad.toml: mine: context: missing"), "{two}");
    assert_eq!(two.message().lines().count(), 2, "context and price: {two}");
    refused(
        &format!("{MODEL}entry = {{ id = \"x\", price = {{ input = 9 }} }}\n"),
        "model.entry.id = \"x\": belongs above",
    );
}

#[test]
fn the_command_line_wins_over_the_file() {
    let overrides = Overrides {
        listen: Some("127.0.0.1:0".into()),
        anonymous: Some("me".into()),
        models: vec![("smollm2-135m-instruct".into(), "/m/b.gguf".into()), ("new".into(), "/m/b.gguf".into())],
        threads: Some(3),
        log_filter: Some("debug".into()),
        log_format: Some(LogFormat::Json),
    };
    let config = with(MODEL, &overrides).unwrap();
    assert_eq!(config.server.listen.port(), 0);
    assert_eq!(config.auth.anonymous, Some(AccountId::new("me")));
    assert_eq!((config.engine.threads, config.log.filter.as_str()), (3, "debug"));
    assert_eq!(config.log.format, LogFormat::Json);
    let paths: Vec<_> = config.models.iter().map(|m| (m.id.as_str(), m.path.to_str().unwrap())).collect();
    assert_eq!(paths, [("@cf/huggingfacetb/smollm2-135m-instruct", "/m/b.gguf"), ("new", "/m/b.gguf")]);
    assert!(config.warnings[0].starts_with("new is not in the catalog"), "{:?}", config.warnings);
    assert!(!config.catalog.resolve("new").unwrap().price.is_zero());
    let wrong = Overrides { listen: Some("x".into()), threads: Some(0), ..Overrides::default() };
    let said = with(MODEL, &wrong).unwrap_err();
    let starts: Vec<_> = said.message().lines().map(|line| line.split(':').next().unwrap()).collect();
    assert_eq!(starts, ["--listen \"x\"", "--threads 0"], "what was typed, not what is in the file: {said}");
    let latest = Overrides { models: vec![("new:latest".into(), "/m/b.gguf".into())], ..Overrides::default() };
    let error = with("", &latest).unwrap_err();
    assert!(error.message().contains("model.id = \"new:latest\": moves with time"), "{error}");
}

#[test]
fn tokens_are_held_as_hashes_wherever_they_come_from() {
    let config = good(&format!(
        "[auth]\ntoken_file = \"$CREDENTIALS_DIRECTORY/tokens.toml\"\n\
         [[auth.token]]\nid = \"env\"\nenv = \"TOKEN\"\naccount = \"x\"\nany_account = true\nexpires = 2026-12-31\n{MODEL}"
    ));
    let [env, file] = &config.auth.tokens[..] else { panic!("{:?}", config.auth.tokens) };
    let expected: [u8; 32] = Sha256::digest(b"a-token-long-enough-to-keep").into();
    assert_eq!((env.sha256, env.any_account), (expected, true));
    assert_eq!(env.expires, Some(Millis(1_798_761_600_000)), "the end of that day");
    assert_eq!((file.id.as_str(), file.sha256[0], file.any_account), ("file", 0x9f, false));
    assert!(config.warnings.is_empty(), "{:?}", config.warnings);
    assert_eq!(good("[auth]\ntoken_file = \"tokens.toml\"\n").auth.tokens.len(), 1);

    let token = |body: &str| format!("[[auth.token]]\nid = \"a\"\naccount = \"x\"\n{body}\n");
    warned(&token("env = \"SHORT\""), "is 4 characters long: it can be guessed");
    warned(&token("env = \"TOKEN\"\nexpires = 2026-11-21"), "expired on 2026-11-21");
    refused(&token("env = \"UNSET\""), "auth.token[0] (a).env = \"UNSET\": is not set in the environment");
    refused(&token("env = \"PADDED\""), "has white space around its value");
    refused(&token("sha256 = \"my-actual-token\""), "auth.token[0] (a).sha256 = (15 characters): is not 64 hex digits");
    refused(&token(""), "has neither sha256 nor env");
    refused(&token(&format!("sha256 = \"{HASH}\"\nenv = \"TOKEN\"")), "has both sha256 and env");
    refused(&token("env = \"TOKEN\"\nexpires = \"soon\""), "expires = soon: is not a date");
    refused(&token("env = \"TOKEN\"\nexpires = 2027-01-01T00:00:00"), "is not a date or a time with offset");
    refused(
        &format!("{}{}", token("env = \"TOKEN\""), token("env = \"SHORT\"")),
        "auth.token[1].id = \"a\": is written twice",
    );
    let same = token("env = \"TOKEN\"").replace("\"a\"", "\"b\"");
    refused(&format!("{}{same}", token("env = \"TOKEN\"")), "auth.token[1] (b): is the same token as a");
    refused("[auth]\ntoken_file = \"none.toml\"\n", "auth.token_file = /etc/neurond/none.toml: cannot be read");
    let syntax = with("[auth]\ntoken_file = \"broken.toml\"\n", &Overrides::default()).unwrap_err();
    assert!(syntax.message().starts_with("/etc/neurond/broken.toml: TOML parse error at line 1"), "{syntax}");
}

#[test]
fn nobody_without_a_token_is_served_to_a_network_by_accident() {
    refused("[server]\nlisten = \"0.0.0.0:80\"\n[auth]\nanonymous = \"x\"\n", "auth.anonymous = \"x\" on 0.0.0.0:80: ");
    refused(
        "[binding]\nlisten = \"10.0.0.1:81\"\naccount = \"x\"\n",
        "binding.listen = 10.0.0.1:81: serves callers without",
    );
    let meant = good(
        "[server]\nlisten = \"[::]:80\"\n[auth]\nanonymous = \"x\"\nallow_anonymous_remote = true\n\
         [binding]\nlisten = \"0.0.0.0:81\"\naccount = \"x\"\n",
    );
    assert_eq!(meant.binding.unwrap().listen.port(), 81);
}

#[test]
fn each_mistake_names_file_key_value_and_remedy() {
    for (text, wanted) in [
        (
            "[server]\nlisten = \"localhost:8080\"",
            "server.listen = \"localhost:8080\": is not an IP address with a port; write 127",
        ),
        ("[server]\nworkers = 0", "server.workers = 0: allows nothing; write at least 1"),
        ("[server]\nmax_body_bytes = 0", "server.max_body_bytes = 0: allows nothing"),
        ("[server]\nmax_connections = 0", "server.max_connections = 0: allows nothing"),
        ("[server]\nread_timeout_ms = 0", "server.read_timeout_ms = 0: is out of range; write milliseconds"),
        ("[server]\nrequest_timeout_ms = 9999999999", "server.request_timeout_ms = 9999999999: is out of range"),
        (
            "[binding]\nlisten = \"127.0.0.1:8080\"\naccount = \"x\"",
            "binding.listen = 127.0.0.1:8080: is server.listen as well",
        ),
        ("[auth]\nanonymous = \"a b\"", "auth.anonymous = \"a b\": is not an account; write 32 hex digits"),
        ("[engine]\nthreads = 0", "engine.threads = 0: allows nothing"),
        ("[lora]\nmax_file_bytes = 7", "lora.max_file_bytes = 7: is less than 1MiB"),
        ("[lora]\nmax_adapters = 0", "lora.max_adapters = 0: allows nothing"),
        ("[lora]\npublic_account = \"a/b\"", "lora.public_account = \"a/b\": is not an account"),
        (
            "[engine]\nprefill_chunk = 513",
            "engine.prefill_chunk = 513: is more than engine.step_tokens = 512; lower it",
        ),
        (
            "[engine]\nprefill_stretch = 0.5",
            "engine.prefill_stretch = 0.5: is neither 0 nor from 1 to 1000; 1.3 is the default",
        ),
        ("[gpu]\ndevices = [1, 0, 1]", "gpu.devices = [1, 0, 1]: names GPU 1 twice"),
        ("[gpu]\nmemory_share = 0.0", "gpu.memory_share = 0: is not above 0 and at most 1; 0.9"),
        ("[gpu]\nprefill_chunk = 5000", "gpu.prefill_chunk = 5000: is more than gpu.step_tokens = 4096; lower it"),
        ("[gpu]\nmax_running = 5000", "gpu.max_running = 5000: is more than gpu.step_tokens = 4096; raise that, or"),
        (&format!("{MODEL}gpus = [0, 0]"), "gpus = [0, 0]: names GPU 0 twice"),
        (
            &format!("{MODEL}gpus = [0]\ntensor_parallel = 2"),
            "gpus = [0]: tensor_parallel = 2 takes as many GPUs, one a rank; name 2 of them",
        ),
        (&format!("{MODEL}gpus = [0]\nprecision = \"plain\""), "gpus = [0]: precision = \"plain\" is the CPU's"),
        (
            "[[model]]\nid = \"@cf/black-forest-labs/flux-1-schnell\"\npath = \"a.gguf\"\ngpus = [0]",
            "gpus = [0]: GPUs serve models that write, embed or classify text; take it out",
        ),
        (
            "[[model]]\nid = \"@cf/baai/bge-m3\"\npath = \"a.gguf\"\ngpu_weights = \"fp8\"",
            "gpu_weights = fp8: models that embed or classify are kept in bf16; take it out",
        ),
        (&format!("{MODEL}tensor_parallel = 0"), "tensor_parallel = 0: is not from 1 to 256; 1, the default"),
        (&format!("{MODEL}tensor_parallel = 257"), "tensor_parallel = 257: is not from 1 to 256"),
        (
            "[[model]]\nid = \"@cf/baai/bge-small-en-v1.5\"\npath = \"a.gguf\"\ntensor_parallel = 2",
            "tensor_parallel = 2: divides models for text generation only, and this one is for Text Embeddings; write 1",
        ),
        (
            "[[model]]\nid = \"smollm2-135m-instruct\"\npath = \"sim\"\ntensor_parallel = 2",
            "tensor_parallel = 2: divides nothing on a simulated device",
        ),
        (
            &format!("{MODEL}spill_folder = \"/var/cache\""),
            "spill_folder = /var/cache: says where, but not how much: write spill_bytes as well",
        ),
        (
            "[[ship]]\nname = \"a\"\nto = \"http\"\nurl = \"https://example.com/\"\nformat = \"parquet\"",
            "ship[0].format = \"parquet\": is for \"s3\" and \"folder\"; leave it out, and the server gets \"ndjson\"",
        ),
        ("[[account]]\nid = \"a\"\nweight = 0", "account[0].weight = 0: is not from 1 to 1000"),
        ("[[account]]\nid = \"a\"\npriority = 101", "account[0].priority = 101: is not from -100 to 100"),
        ("[[account]]\nid = \"a b\"", "account[0].id = \"a b\": is not an account"),
        (
            "[[account]]\nid = \"a\"\n[[account]]\nid = \"a\"",
            "account[1].id = \"a\": is written twice; keep one of them",
        ),
        (
            "[engine]\nmax_running = 513",
            "engine.max_running = 513: is more than engine.step_tokens = 512; raise that, or",
        ),
        ("[engine]\nmax_queue = 0", "engine.max_queue = 0: allows nothing"),
        (
            "[engine]\ndraft_tokens = 65",
            "engine.draft_tokens = 65: is more than 64, and guesses that deep are hardly ever right; lower it",
        ),
        (
            "[engine]\nblock_tokens = 24",
            "engine.block_tokens = 24: is not a power of two from 4 to 256; 16 is the default",
        ),
        ("[log]\nfilter = \"neurond=loud\"", "log.filter = \"neurond=loud\": is not a log filter"),
        (
            "[[model]]\nid = \"x:latest\"\npath = \"a.gguf\"",
            "model.id = \"x:latest\": moves with time; name one version",
        ),
        (
            "[[model]]\nid = \"@cf/qwen/qwq-32\"\npath = \"a.gguf\"",
            "did you mean \"@cf/qwen/qwq-32b\"? Otherwise give it an entry",
        ),
        (
            "[[model]]\nid = \"other\"\npath = \"a.gguf\"",
            "model.id = \"other\": is not in the catalog; give it an entry",
        ),
        ("[[model]]\nid = \"@cf/qwen/qwq-32b\"\npath = \"b.gguf\"", "path = /etc/neurond/b.gguf: cannot be read"),
        ("[[model]]\nid = \"@cf/qwen/qwq-32b\"\npath = \"a.gguf\"\nkv_bytes = 16", "kv_bytes = 16: is less than 1MiB"),
        ("[[model]]\nid = \"@cf/qwen/qwq-32b\"\npath = \"a.gguf\"\ncontext = 0", "context = 0: allows nothing"),
    ] {
        refused(text, wanted);
    }
    refused(&format!("{MODEL}{MODEL}"), "is loaded twice; keep one of the blocks");
    warned("[engine]\nthreads = 32", "engine.threads = 32: this process may use 16 CPUs");
}

#[test]
fn all_mistakes_are_told_at_once() {
    let error =
        with("[server]\nworkers = 0\nlisten = \"x\"\n[engine]\nthreads = 0\n", &Overrides::default()).unwrap_err();
    assert_eq!(error.message().lines().count(), 3, "{error}");
}

#[test]
fn a_loaded_model_that_goes_away_is_warned_about() {
    warned(&format!("{MODEL}entry = {{ planned_deprecation = 2026-12-24 }}\n"), "goes away on 2026-12-24, in 32 days");
    let far = good(&format!("[auth]\nanonymous = \"x\"\n{MODEL}entry = {{ planned_deprecation = 2027-12-24 }}\n"));
    assert!(far.warnings.is_empty(), "{:?}", far.warnings);
}

#[test]
fn a_file_on_disk_is_found_read_and_its_syntax_errors_have_a_line() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("neurond.toml");
    std::fs::write(&path, "[server]\nlisten = \"127.0.0.1:9\"\n").unwrap();
    let config = crate::config::load(Some(&path), &Overrides::default()).unwrap();
    assert_eq!((config.server.listen.port(), config.origin.as_deref()), (9, Some(path.as_path())));

    std::fs::write(&path, "[server]\nlissten = \"127.0.0.1:9\"\n").unwrap();
    let said = crate::config::load(Some(&path), &Overrides::default()).unwrap_err();
    let said = said.message();
    assert!(said.starts_with(&format!("{}: TOML parse error at line 2", path.display())), "{said}");
    assert!(said.contains("unknown field `lissten`, expected one of `listen`"), "{said}");

    let gone = crate::config::load(Some(&folder.path().join("none.toml")), &Overrides::default()).unwrap_err();
    assert!(gone.message().contains("name an existing file with --config"), "{gone}");
}

#[test]
fn a_fleet_shares_cached_answers_where_it_is_told_to_in_its_store_or_in_another() {
    let shared = |more: &str| {
        let config = good(&format!("[fleet]\nurl = \"redis://limits:1\"\n{more}"));
        let cache = config.metering.fleet.unwrap().cache?;
        Some((cache.urls.iter().map(|url| url.expose().clone()).collect::<Vec<_>>().join(" "), cache.max_entry_bytes))
    };
    assert_eq!(shared(""), None);
    assert_eq!(shared("cache = true"), Some(("redis://limits:1".to_owned(), 1 << 20)));
    let elsewhere = "cache = true\ncache_url = \"rediss://answers:2\"\ncache_entry_bytes = \"64KiB\"";
    assert_eq!(shared(elsewhere), Some(("rediss://answers:2".to_owned(), 64 << 10)));
    let wrong = |more: &str, wanted: &str| refused(&format!("[fleet]\nurl = \"redis://limits:1\"\n{more}"), wanted);
    wrong("cache_url = \"answers:2\"", "fleet.cache_url is no address");
    wrong("cache_url = \"redis://a:2, redis://b:2\"", "fleet.cache_url has several addresses");
    wrong("cache_entry_bytes = 0", "fleet.cache_entry_bytes = 0: is not from 1 byte");
    wrong("cache_entry_bytes = \"65MiB\"", "fleet.cache_entry_bytes");
}

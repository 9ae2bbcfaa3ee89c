// SPDX-License-Identifier: GPL-2.0

//! A folder of obdsetup's sources uses only itself and the folders after it in the list in `src/lib.rs`.

use std::fs;
use std::path::Path;

use walkdir::WalkDir;

use crate::common::tests;

tests! {
    folders_use_only_those_below;
    what_counts_as_a_use;
}

/// Returns the folders that `text` uses, each with the line of the use. Comments don't count.
fn uses(text: &str) -> impl Iterator<Item = (&str, &str)> {
    let code = text.lines().filter(|line| !line.trim().starts_with("//"));
    code.flat_map(|line| {
        let parts = line.split("crate::").skip(1);
        parts.map(move |part| {
            (
                part.split(|c: char| !c.is_ascii_lowercase())
                    .next()
                    .unwrap(),
                line,
            )
        })
    })
}

fn folders_use_only_those_below() {
    let src = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let list = fs::read_to_string(src.join("lib.rs")).unwrap();
    let order: Vec<&str> = list
        .lines()
        .filter_map(|line| line.strip_prefix("//! - [`")?.split('`').next())
        .collect();
    let mut folders = 0;
    let mut count = 0;
    for entry in fs::read_dir(&src).unwrap() {
        let path = entry.unwrap().path();
        if !path.is_dir() {
            continue;
        }
        folders += 1;
        let name = path.file_name().unwrap().to_str().unwrap();
        let place = |folder: &str| order.iter().position(|&other| other == folder);
        // Fails if the folder is not in the list.
        let own = place(name).expect(name);
        for file in WalkDir::new(&path) {
            let file = file.unwrap();
            if !file.file_name().to_str().unwrap().ends_with(".rs") {
                continue;
            }
            let text = fs::read_to_string(file.path()).unwrap();
            for (folder, line) in uses(&text) {
                // The only other module of lib.rs, `tars`, is for tests.
                let Some(used) = place(folder) else {
                    assert_eq!(folder, "tars", "{}: {line}", file.path().display());
                    continue;
                };
                count += 1;
                assert!(used >= own, "{}: {line}", file.path().display());
            }
        }
    }
    assert_eq!(folders, order.len(), "{order:?}");
    assert!(count >= 200, "{count}");
}

fn what_counts_as_a_use() {
    let text = "use crate::make::output;\n// crate::cmd\n    crate::terminal::tell(crate::x());";
    let found: Vec<_> = uses(text).map(|(folder, _)| folder).collect();
    assert_eq!(found, ["make", "terminal", "x"]);
}

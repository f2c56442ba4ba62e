use fairlead_fuzz::{bounded, fuzz, spoiled};

use super::*;

fn rows(name: &str, text: impl AsRef<[u8]>) -> Result<Vec<Row>> {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join(name);
    std::fs::write(&path, text).expect("written");
    read(&path)
}

fn prompts(name: &str, text: &str) -> Vec<String> {
    let rows = rows(name, text).unwrap_or_else(|error| panic!("{name}: {error:#}"));
    rows.iter().map(|row| row.prompt(None).expect("a prompt").to_owned()).collect()
}

fn refusal(name: &str, text: impl AsRef<[u8]>) -> String {
    let read = rows(name, text).and_then(|rows| {
        for row in &rows {
            row.prompt(None)?;
            row.number::<u64>("seed")?;
        }
        Ok(rows)
    });
    format!("{:#}", read.expect_err(name))
}

#[test]
fn csv_and_json_lines_say_the_same() {
    let csv = "\u{feff}prompt,seed,concept\r\n\"a cat, and a \"\"dog\"\"\",7,\r\nb,,axe\r\n";
    let semicolons = "Prompt;Seed;concept\n\"a cat, and a \"\"dog\"\"\";7.0;\nb;;axe\n";
    let tabs = "prompt\tseed\tconcept\n\"a cat, and a \"\"dog\"\"\"\t7\t\nb\t\taxe\n";
    let json = "\u{feff}{\"prompt\": \"a cat, and a \\\"dog\\\"\", \"seed\": 7}\n\n\
                {\"prompt\": \"b\", \"seed\": null, \"concept\": \"axe\"}\n";
    let list = "[{\"prompt\": \"a cat, and a \\\"dog\\\"\", \"seed\": 7.0},\n\
                {\"prompt\": \"b\", \"concept\": \"axe\"}]";
    for (name, text) in [
        ("p.csv", csv),
        ("p.CSV", semicolons),
        ("p.tsv", tabs),
        ("p.txt", csv),
        ("p.jsonl", json),
        ("p.json", list),
    ] {
        let rows = rows(name, text).expect("it is a table");
        assert_eq!(rows.len(), 2);
        assert_eq!(rows[0].prompt(None).expect("there"), "a cat, and a \"dog\"");
        assert_eq!(rows[0].number::<u64>("seed").expect("a number"), Some(7));
        let concept = |row: &Row| row.find("concept").expect("text or none").map(str::to_owned);
        assert_eq!((concept(&rows[0]), concept(&rows[1])), (None, Some("axe".to_owned())));
        assert_eq!(rows[1].number::<u64>("seed").expect("none"), None);
        let missing = rows[0].get("concept").expect_err("empty").to_string();
        assert!(missing.contains("row 1") && missing.contains("`concept`"), "{missing}");
    }
}

#[test]
fn prompts_are_found_in_lists_captions_and_plain_text() {
    let expected = ["a cat", "a dog, sitting"];
    for (name, text) in [
        ("p.txt", "\u{feff}a cat\r\n\r\n  a dog, sitting\n"),
        ("p.json", "[\"a cat\", \"a dog, sitting\"]"),
        ("p.json", "{\"prompts\": [\"a cat\", \"a dog, sitting\"]}"),
        ("p.jsonl", "\"a cat\"\n\"a dog, sitting\"\n"),
        (
            "captions_val.json",
            "{\"info\": {\"year\": 2017}, \"images\": [{\"id\": 1}], \"annotations\": [\
             {\"image_id\": 1, \"id\": 7, \"caption\": \"a cat\"},\
             {\"image_id\": 1, \"id\": 8, \"caption\": \"a dog, sitting\"}]}",
        ),
        ("p.csv", "caption\na cat\n\"a dog, sitting\"\n"),
        ("one.txt", "a cat\na dog, sitting"),
    ] {
        assert_eq!(prompts(name, text), expected, "{name}");
    }
}

#[test]
fn a_value_of_another_kind_is_not_taken_for_text() {
    for (text, expected) in [
        ("[{\"prompt\": 5}]", "row 1: `prompt` is the number 5; it must be text"),
        ("[{\"prompt\": [\"a\"]}]", "row 1: `prompt` is a list; it must be text"),
        ("[{\"prompt\": {\"0\": \"a\"}}]", "row 1: `prompt` is an object; it must be text"),
        ("[\"a\", 5]", "row 2: this is a number; it must be an object or a text"),
        ("5", "this is a number; it must be a list of prompts"),
        ("[{\"prompt\": \"a\", \"seed\": true}]", "`seed` is `true`, which is no such number"),
        ("[{\"prompt\": \"a\", \"seed\": 7.5}]", "`seed` is `7.5`, which is no such number"),
        ("[{\"prompt\": \"a\", \"seed\": -1}]", "`seed` is `-1`, which is no such number"),
        ("{\"annotations\": [{\"bbox\": [1]}]}", "no `caption`; give one of COCO's captions"),
        ("[{\"prompt\": \"a\", \"Prompt\": \"b\"}]", "two fields are called `prompt`"),
    ] {
        let error = refusal("p.json", text);
        assert!(error.contains(expected) && error.contains("p.json"), "{error}");
    }
}

#[test]
fn a_broken_table_says_where() {
    for (name, text, expected) in [
        ("p.csv", "prompt\n", "p.csv: the table has no row"),
        ("p.csv", "prompt,b\n1\n", "p.csv: line 2 has 1 columns, the header has 2"),
        ("p.csv", "prompt\na cat, sitting\n", "in double quotes, or call the file .txt"),
        ("p.csv", "prompt,a,A\nx,1,2\n", "p.csv: two columns are called `a`; rename one"),
        ("p.jsonl", "{\"prompt\": \"a\"}\n[1]\n", "p.jsonl: line 2: this is a list"),
        ("p.jsonl", "{\"prompt\": \"a\"}\n{\"prompt\"\n", "p.jsonl: line 2: the text ends before"),
        ("p.json", "", "p.json: the table has no row"),
        ("p.json", "[\n", "p.json: line 2, column 0: the text ends before the JSON does"),
        ("p.json", "[\n{\"prompt\": \"a\"},\n]", "p.json: line 3, column 1: this is not JSON"),
        ("p.csv", "seed\nx\n", "row 1: none of the columns prompt, adv_prompt"),
        ("p.csv", "prompt,seed\na,x\n", "row 1: `seed` is `x`, which is no such number"),
    ] {
        let error = refusal(name, text);
        assert!(error.contains(expected), "{error}");
    }
    let latin = refusal("p.csv", b"prompt\ncaf\xe9\n");
    assert!(latin.contains("p.csv: line 2 is not UTF-8"), "{latin}");
    let none = read(Path::new("/nowhere/p.csv")).expect_err("absent").to_string();
    assert!(none.contains("/nowhere/p.csv"), "{none}");
}

#[test]
fn spoiled_tables_are_rows_or_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    for (name, valid) in [
        ("p.csv", "prompt;seed\n\"a; b\";7\nc;8\n"),
        ("p.json", "{\"annotations\": [{\"caption\": \"a\", \"id\": 1}]}"),
    ] {
        let path = folder.path().join(name);
        fuzz(spoiled(valid.as_bytes().to_vec()), |bytes| {
            std::fs::write(&path, &*bytes).expect("written");
            match bounded(bytes.len(), || read(&path)) {
                Ok(rows) => assert!(!rows.is_empty()),
                Err(error) => assert!(format!("{error:#}").contains(name), "{error:#}"),
            }
        });
    }
}

// Questions of the demo pair's task. The names describe how the demo pair answers them at temperature 0.

export const EXAMPLES = [
  {
    name: "Totals, an error in the middle",
    question:
      "Rosa has 83 books. In turn: first breaks 2, second finds 2, third wins 8, fourth sells 6, fifth gets 6, sixth earns 6, seventh loses 3, eighth lends 9, ninth loses 5, tenth breaks 4, eleventh lends 3. How many books now?",
  },
  {
    name: "Record, an error near the end",
    question:
      "Finn has the record with 92. In turn: first Pam 21, second Will 75, third Nora 11, fourth Quinn 36, fifth Ann 5, sixth Zoe 32, seventh Jack 39, eighth Ida 94, ninth Uma 24. Who has the record now?",
  },
  {
    name: "Totals, an uncertain verification",
    question:
      "Ben has 86 books. In turn: first earns 4, second loses 5, third wins 3, fourth finds 5, fifth wins 6, sixth lends 6, seventh sells 9, eighth finds 7, ninth earns 5, tenth breaks 5, eleventh buys 7, twelfth lends 6. How many books now?",
  },
  {
    name: "Record, an early error: try rounds",
    question:
      "Kim has the record with 27. In turn: first Uma 73, second Max 52, third Jack 74, fourth Quinn 34, fifth Dan 38, sixth Ben 80, seventh Sam 26. Who has the record now?",
  },
  {
    name: "Record, wrong from the start",
    question:
      "Tess has the record with 81. In turn: first Cara 74, second Sam 92, third Kim 6, fourth Dan 36, fifth Quinn 43, sixth Nora 93, seventh Leo 38, eighth Finn 61, ninth Zoe 78, tenth Otto 7, eleventh Jack 44. Who has the record now?",
  },
  {
    name: "Totals, no error",
    question:
      "Eve has 35 keys. In turn: first wins 3, second sells 9, third breaks 2, fourth wins 4, fifth drops 8, sixth sells 8, seventh drops 4, eighth drops 7. How many keys now?",
  },
];

export const MODES = {
  auto: "The mode that the operator chose while drafting pays, otherwise off.",
  full: "Verify the complete draft at once. The target generates after the accepted prefix.",
  rounds: "Like full, but the drafter continues after a correction by the target.",
  progressive: "Verify windows of the draft while the next one is drafted. The first tokens arrive early.",
  exact: "Accept draft tokens as long as the target would have chosen them. No prefix is verified.",
  off: "The target generates the answer alone.",
};

/** The labels of methods whose names are not ordinary words. */
export const WORDS = { draft_model: "draft model", ngram: "n-grams" };

"""Answers as models write them to GSM8K and MATH, right and wrong: no wrong one may count, and every right one must."""

import json
import random
import time

import pytest

from caftune.evals.maths import GSM8K, MATH500, TIMEOUT_S
from caftune.evals.quantity import in_words, stated, value_of
from caftune.evals.task import Example, until_stop

# (reference, what a model wrote)
GSM8K_RIGHT = [
    ("72", "The answer is that she sold 72 clips in 2 months."),
    ("72", "Natalia sold 48/2 = 24 clips in May.\nNatalia sold 48+24 = 72 clips altogether in April and May.\n#### 72"),
    (
        "72",
        "Natalia sold 48 clips in April. In May it is half of that, 24. Therefore, Natalia sold 48 + 24= 72 clips in all.",
    ),
    (
        "72",
        "To find it:\n\n1. **April**: 48 clips\n2. **May**: 48 \xf7 2 = 24 clips\n\n**Total**: 48 + 24 = **72** clips",
    ),
    ("72", "So, Natalia sold 72 clips altogether.\n\n#### 72\n\nLet me know if you have 1 or 2 more questions!"),
    ("72", "#### 72 clips altogether in April and May"),
    ("72", "#### 72\n\n#### Explanation\n1. 48\n2. 24"),
    ("72", r"The final answer is: $\boxed{72}$"),
    ("72", "Final Answer: The final answer is $72$. I hope it is correct."),
    ("72", "**Final Answer**\n\\[ \\boxed{72} \\]"),
    ("72", r"Answer: \boxed{72}"),
    ("72", "\\boxed{72}.\n\nVerification: 48 + 24 = 72, and 24 * 2 = 48."),
    ("72", "The answer is 72.\n\nVerification: 48 + 24 = 72, and 24 * 2 = 48."),
    ("72", "She sold 48 + 24 = <<48+24=72>>72 clips.\n#### 72"),
    ("72", "She sold 48 + 24 = <<48+24=72>>72 clips."),
    ("72", "Answer: 72."),
    ("72", "answer: 72"),
    ("72", "A: 72"),
    ("72", "A: The answer is 72."),
    ("72", "<answer>72</answer>"),
    ("72", "<answer>\n72\n</answer>"),
    ("72", "The answer is `72`."),
    ("72", "```\n72\n```"),
    ("72", "'72'"),
    ("72", '"72"'),
    ("72", "Therefore, the answer is $72."),
    ("72", "The answer is 72 USD."),
    ("72", "The answer is 72€."),
    ("72", "The answer is +72."),
    ("72", "The answer is 072."),
    ("72", "The answer is 72.0"),
    ("72", "The answer is 72.000"),
    ("72", "The answer is seventy-two."),
    ("72", "The answer is seventy-two (72)."),
    ("72", "The answer is 72 (seventy-two)."),
    ("72", "Hence the answer is: 72 pieces; each has 3 parts."),
    ("72", "So the answer is 72 – that is all 6 boxes."),
    ("72", "So the answer is 72 - that is all 6 boxes."),
    ("72", "So the answer is 72—6 boxes of 12."),
    ("72", "The answer is 72 clips, i.e. 6 dozen."),
    ("72", "The answer is 72; 48 in April and 24 in May."),
    ("72", "The answer is 72: 48 in April and 24 in May."),
    ("72", "The answer is 72 with 3 left over."),
    ("72", "The answer is 72 for 2 months."),
    ("72", "The answer is 72 after 3 days and 2 nights."),
    ("72", "The answer is 72 hours (3 days)."),
    ("72", "The answer is 72 per 100."),
    ("72", "The total is 72. The answer is correct."),
    ("72", "Since 72 > 70, the answer is yes. She sold 72."),
    ("72", "The answer is\n72"),
    ("72", "The answer is:\n\n**72**"),
    ("72", r"#### \boxed{72}"),
    ("72", "#### Final answer: 72"),
    ("72", "#### The answer is 72."),
    ("72", "####72"),
    ("72", "####  72  "),
    ("72", "#### 72</s>"),
    ("72", "#### 72<|im_end|>"),
    ("72", "#### 72\n<|endoftext|>junk 5"),
    ("72", "#### 72\u2028And 5 more"),
    ("72", "#### 72\x0bnext 5"),
    ("72", "#### 72\tclips"),
    ("72", "### 72"),
    ("72", "### Answer: 72"),
    ("72", "### Step 1: 48/2 = 24\n### Step 2: 48+24 = 72\n### Answer: 72 clips"),
    ("72", "## Step 1\n48\n## Step 2\nThe final answer is: $\\boxed{72}$"),
    ("72", "#### Step 1: Find May\n48/2 = 24\n#### Step 2: Add\n48 + 24 = 72\n#### Answer\n72"),
    ("72", "#### 1. April: 48\n#### 2. May: 24\n#### Total: 72"),
    ("3", "#### 1. April: 48\n#### 2. May: 24\n#### 3"),
    ("1", "#### 1"),
    ("1", "#### 1 clip"),
    ("2", "#### 2 weeks"),
    ("72", r"\boxed{72^\circ}"),
    ("72", r"\boxed{72\%}"),
    ("72", r"\boxed{\approx 72}"),
    ("72", r"\boxed{72} \text{ clips}"),
    ("72", r"\boxed{\textbf{72}}"),
    ("72", r"\boxed{\mathbf{72}}"),
    ("72", r"\boxed{ 72 }"),
    ("72", r"\boxed{\text{72 clips}}"),
    ("72", r"\boxed{\text{Natalia sold 72 clips}}"),
    ("72", r"\boxed{48+24=72}"),
    ("72", r"\boxed{72 = 48 + 24}"),
    ("72", r"\boxed{\frac{144}{2}}"),
    ("72", r"\boxed{\text{Total} = 72}"),
    ("72", r"\boxed 72"),
    ("72", "boxed{72}"),
    ("72", r"$\boxed{72}$ clips, 5 boxes"),
    ("1200", "The answer is 1.2k."),
    ("1200", "The answer is $1.2K"),
    ("1200", "The answer is 1,2 thousand"),
    ("1200", "The answer is 1 200 clips"),
    ("1200", "The answer is 1,200.00"),
    ("1200", "12 hundred"),
    ("1200", "The answer is 1200 or so."),
    ("2500000", "The answer is 2.5 million dollars."),
    ("2500000", "The answer is $2.5M."),
    ("2500000", r"#### 2.5 \times 10^6"),
    ("2500000", "The answer is 2,500,000."),
    ("5", "How many? five"),
    ("5", "She needs five more apples."),
    ("0", "The answer is 0."),
    ("0", "The answer is zero."),
    ("0", "#### 0%"),
    ("25", "The answer is 25%."),
    ("-3", "The answer is -3 degrees."),
    ("-3", "The answer is −3."),
    ("-3", "The answer is –3."),
    ("-3", "The answer is negative three."),
    ("7.5", "The answer is 7 1/2."),
    ("7.5", "The answer is 7½ hours."),
    ("7.5", "The answer is 7.50 dollars."),
    ("7.5", "The answer is 15/2"),
    ("7.5", r"\boxed{7\frac{1}{2}}"),
    ("7.5", r"The answer is $7\frac{1}{2}$."),
    ("7.5", "The answer is seven and a half"),
    ("18", "Janet makes 9 * $2 = $18 every day at the farmers' market."),
    ("18", "**Janet makes $18 every day.**"),
    ("540", "He runs 3*3=9 sprints, 9*60 = 540 meters a week"),
    ("20", "Total: 5 + 15 = $20."),
    ("64", "$64"),
    ("72", "The answer is 72. Checking 6*12 = 72, so the answer is correct."),
    ("72", "The answer is 72, in total, so the shop earns that much."),
    ("72", "The answer is 72!"),
    ("72", "The answer is 72 (6 boxes of 12)."),
    ("72", "The answer is 72 because 3 of the 4 were sold."),
    ("72", "#### 72 = 6*12"),
    ("72", "#### 72 clips (6 dozen)"),
    ("72", "#### 72 cm^2"),
    ("72", "#### 72\r\nThat is all 5 of them."),
    ("72", "#### 1 First\n48/2=24\n#### 2 Second\n48+24\nThe answer is 72."),
    ("72", "#### 1\n48\n#### 2\n3\nThe answer is 72."),
    ("72", "**Answer:** 72 clips"),
    ("72", "Answer: 72 clips (48 + 24)"),
    ("72", "**Final Answer**\n\n72"),
    ("72", "$48 + 24 = 72$ clips"),
    ("72", "She sold **72** clips in 2 months."),
    ("72", r"\boxed{72\text{ clips}}"),
    ("72", r"\boxed{\$72}"),
    ("72", r"\[\boxed{72}\]"),
    ("72", "So 48 + 24 = 72 clips (that is 6 dozen)."),
    ("72", "#### **72**"),
    ("72", "#### $72$"),
    ("72", "#### Answer: 72"),
    ("72", "The answer is\n\n$$72$$"),
    ("72", "She has 72, not 74."),
    ("72", "The answer is not 74 but 72."),
    ("72", "#### 72.00"),
    ("72", r"#### \$72"),
    ("72", "#### 72 dollars."),
    ("72", "So it is 72. #### 72"),
    ("72", "#### 74\nWait, I made a mistake: 48+24 is\n#### 72"),
    ("72", "seventy-two clips"),
    ("72", r"\boxed{6 \times 12 = 72}"),
    ("1200", "#### 1 200"),
    ("1200", "#### 1\u202f200"),
    ("1200", "#### 1'200"),
    ("18000", "#### 18k"),
    ("18", "#### 18 km"),
    ("1000000", "The answer is 1 million."),
    ("1.5", "The answer is 1 1/2 hours."),
    ("2500", "The answer is 2.5e3"),
    ("864", "#### 72 dozen"),
]

GSM8K_WRONG = [
    ("72", "#### 72 - 2"),
    ("72", "#### 72 minutes and 10 seconds"),
    ("72", "She needs 72 in all, and has 2. #### 70"),
    ("72", "The answer is 70 + 2 = 73."),
    ("72", "Total = 72 + 8 = 80"),
    ("72", "The answer is 72 apples and 5 pears."),
    ("72", "**Answer: 71** (one less than 72)"),
    ("72", "The answer is 71. With one more it would be 72."),
    ("72", "Half of 144 is 72, so the answer is 144."),
    ("72", "#### 72e3"),
    ("72", "#### 7.2"),
    ("72", "\\boxed{72} is for May. In total: \\boxed{120}"),
    ("72", "The answer is 72 thousand."),
    ("72", "#### 1/72"),
    ("72", "The answer is seventy-three."),
    ("72", "I get 72. No, sorry, that's wrong: it is 71."),
    ("72", "The answer should not be 72 but 70."),
    ("72", "Step 72: done. #### 5"),
    ("72", "#### 24\n\nThe answer is 72"),
    ("72", "The answer is 7 2."),
    ("72", "#### 7 2"),
    ("72", "#### 72 or 73"),
    ("72", "#### 70-72"),
    ("72", "#### 72, 73"),
    ("72", "#### 73 (not 72)"),
    ("72", "#### 73\nNote: without tax it is 72."),
    ("72", "The answer is 73, i.e. one more than 72."),
    ("72", "The answer is 73 = 72 + 1."),
    ("72", "The answer is 72 + 1 = 73."),
    ("72", "The answer is 73. The answer is not 72."),
    ("72", "The answer is 72 minutes and 30 seconds."),
    ("72", "The answer is 72 minutes 30 seconds."),
    ("72", "The answer is 1 hour and 72 minutes."),
    ("72", "The answer is 7.2e2."),
    ("72", "The answer is 72000."),
    ("72", "The answer is 0.72."),
    ("72", "The answer is 72 hundred"),
    ("72", "It cannot be 72."),
    ("72", "I don't think the answer is 72."),
    ("72", "The answer isn't 72."),
    ("72", "Is the answer 72? No, it is 74."),
    ("72", "The answer is 72? No, it is 74."),
    ("72", "The answer is 72. Wait, no. It's 74."),
    ("72", "The answer is 72. Actually, it is 74."),
    ("72", r"\boxed{72} Hmm, let me recheck. It should be \boxed{74}."),
    ("72", r"\boxed{72} Hmm, wait. 48 + 26 = 74. So the answer is 74."),
    ("72", "#### 72\nWait, I forgot two. 72 + 2 = 74\n#### 74"),
    ("72", "#### 72\nActually, the answer is 74."),
    ("72", "#### 72\nCorrection: #### 74"),
    ("72", "Answer: 72\nCorrection: 74"),
    ("72", "She starts with 72 and ends with 70."),
    ("72", "There are 72 clips. The answer is not enough information."),
    ("72", "The answer cannot be determined from the 72 clips."),
    ("72", r"\boxed{\frac{72}{5}}"),
    ("72", r"\boxed{72!}"),
    ("72", r"\boxed{72,000}"),
    ("72", r"\boxed{(72, 3)}"),
    ("72", r"\boxed{\{72, 73\}}"),
    ("72", r"\boxed{72, 73}"),
    ("72", r"\boxed{72 \text{ or } 73}"),
    ("72", r"\boxed{71 < x < 72}"),
    ("72", r"\boxed{x > 72}"),
    ("72", r"\boxed{72 \text{ to } 74}"),
    ("72", r"\boxed{72\,000}"),
    ("72", r"\boxed{72 \text{ thousand}}"),
    ("72", r"\boxed{-72}"),
    ("72", r"\boxed{72.5}"),
    ("72", r"\boxed{72i}"),
    ("25", "The answer is 0.25"),
    ("3", "The answer is –3."),
    ("3", "The answer is negative three."),
    ("7", "The answer is seven and a half"),
    ("72", "The answer is 72 or 73."),
    ("72", "#### 72k"),
    ("72", "#### 72.5"),
    ("72", "#### 720"),
    ("72", "#### -72"),
    ("72", "#### 72 million"),
    ("72", "The answer is 72 and a half."),
    ("72", r"\boxed{72} or \boxed{73}"),
    ("72", "The answer is 72. I made a mistake. The answer is 74."),
    ("72", "The answer is not 72."),
    ("72", "#### 74\nSo 72 was for May"),
    ("72", "The answer is more than 72."),
    ("72", "The answer is 72-74."),
    ("72", "The answer is between 70 and 72."),
    ("72", r"\boxed{72x}"),
    ("72", r"\boxed{72\pi}"),
    ("72", "#### 72 dozen"),
    ("72", "The answer is 72:30"),
    ("72", "She has 74 clips, not 72."),
    ("72", "#### 72,5"),
    ("72", "#### 72,500"),
    ("72", "#### 72/2"),
    ("72", "The answer is minus 72"),
    ("72", "#### 72 + 5"),
    ("18", "#### 18k"),
    ("7", "The answer is 7.5"),
]

MATH_RIGHT = [
    (r"\frac{1}{2}", r"The answer is $\frac{1}{2}$, since $x=3$ gives $y=2$."),
    (r"\frac{1}{2}", r"The answer is \frac{1}{2}."),
    (r"\frac{1}{2}", r"The answer is \frac{1}{2}, because 3 of 6 are red."),
    (r"\frac{1}{2}", r"The answer is $\frac12$."),
    (r"\frac{1}{2}", "The answer is 1/2."),
    (r"\frac{1}{2}", "The answer is 0.5, as we saw."),
    (r"\frac{1}{2}", r"\boxed{\dfrac12}"),
    (r"\frac{1}{2}", r"$$\boxed{\dfrac{1}{2}}$$"),
    (r"\frac{1}{2}", r"The probability is $\frac{3}{6} = \frac{1}{2}$."),
    (r"\frac{1}{2}", r"Thus, the probability is $\frac{1}{2}$."),
    (r"\frac{1}{2}", r"\boxed{P = \frac{1}{2}}"),
    (r"\frac{1}{2}", r"\boxed{\text{Probability} = \frac{1}{2}}"),
    (r"\frac{1}{2}", r"**Answer:** $\frac{1}{2}$"),
    (r"\frac{1}{2}", "Answer: 1/2"),
    (r"\frac{1}{2}", r"\boxed{50\%}"),
    (r"\frac{1}{2}", r"Final Answer: The final answer is $\frac{1}{2}$. I hope it is correct."),
    (r"\frac{1}{2}", r"The answer is $\frac{1}{2}$. Checking: $\frac{1}{2}+\frac12=1$, so the answer is correct."),
    (r"\frac{1}{2}", r"The answer is \(\frac{1}{2}\)"),
    (r"\frac{1}{2}", "The answer is\n\\[\\frac{1}{2}\\]"),
    ("3, 5", r"\boxed{3} and \boxed{5}"),
    ("3, 5", r"$\boxed{3}$ or $\boxed{5}$"),
    ("3,5", "The answers are $x = 3$ and $x = 5$."),
    ("3,5", r"\boxed{x = 3, x = 5}"),
    ("3,5", r"\boxed{5, 3}"),
    ("3,5", r"\boxed{\{3,5\}}"),
    ("3,5", "The answer is 3 and 5."),
    ("3,5", "The answer is $3$ and $5$, as required."),
    ("3,5", r"\boxed{3 \text{ and } 5}"),
    ("3,5", r"\boxed{x=3\text{ or }x=5}"),
    ("5", r"\boxed{x = 5}"),
    ("5", r"\boxed{5 \text{ cm}}"),
    ("5", r"\boxed{5\ \text{cm}^2}"),
    ("5", r"\boxed{5^\circ}"),
    ("5", r"\boxed{\$5}"),
    ("120", r"\boxed{5!}"),
    ("120", "The answer is $5!$."),
    ("120", "The answer is $5! = 120$."),
    ("5", "The answer is $5$!"),
    ("5", r"\boxed{5} \text{ units}"),
    ("5", r"\boxed{n=5}"),
    ("5", r"The value of $x$ is $\boxed{5}$."),
    ("5", r"\framebox{5}"),
    ("5", r"\fbox{5}"),
    ("5", r"\[x = 5\]"),
    ("5", "Therefore $x = 5$."),
    ("5", "The answer is $2+3$."),
    ("5", "The answer is $2 + 3 = 5$."),
    ("5", "The answer is $x=5$ since $2x=10$."),
    ("5", r"\boxed{\text{5 units}}"),
    ("5", r"\boxed{5.0}"),
    ("5", r"\boxed{+5}"),
    ("5", r"\boxed{\sqrt{25}}"),
    ("5", r"\boxed{\frac{10}{2}}"),
    ("(3,4)", "The answer is (3, 4)."),
    ("(3,4)", "The answer is $(3,4)$ because $3^2+4^2=25$."),
    ("(3,4)", "The answer is (3, 4), which lies on the line y = 4."),
    ("(3,4)", r"\boxed{\left(3, 4\right)}"),
    ("(3,4)", r"\boxed{(x, y) = (3, 4)}"),
    ("p - q", "The answer is $p - q$."),
    ("p - q", r"\boxed{p-q}"),
    ("p - q", r"\boxed{-q+p}"),
    ("p - q", "The answer is p - q."),
    (r"\text{east}", "The answer is east."),
    (r"\text{east}", r"\boxed{\text{East}}"),
    (r"\text{east}", r"\boxed{east}"),
    (r"\text{east}", "The answer is **east**."),
    (r"\text{east}", "The answer is east. Since 180 = 180, the answer is correct."),
    (r"\text{(C)}", r"\boxed{C}"),
    (r"\text{(C)}", r"\boxed{(C)}"),
    (r"\text{(C)}", "The answer is (C)."),
    (r"\text{(C)}", r"The answer is $\textbf{(C)}$."),
    (r"\text{(C)}", "Answer: C"),
    (r"2\sqrt{3}", r"\boxed{2\sqrt3}"),
    (r"2\sqrt{3}", r"\boxed{\sqrt{12}}"),
    (r"2\sqrt{3}", r"The answer is 2\sqrt{3} \approx 3.46."),
    (r"2\sqrt{3}", r"The answer is $2\sqrt{3} \approx 3.46$."),
    (r"2\sqrt{3}", "The answer is 2√3."),
    (r"\pi", r"The answer is $\pi$."),
    (r"\pi", "The answer is π."),
    ("x^2+2x+1", r"\boxed{(x+1)^2}"),
    ("x^2+2x+1", r"\boxed{f(x) = x^2+2x+1}"),
    ("[2,5)", r"\boxed{x \in [2,5)}"),
    ("[2,5)", r"\boxed{2 \le x < 5}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"The answer is $\begin{pmatrix} 1 \\ 2 \end{pmatrix}$."),
    (r"1,\!000", r"\boxed{1000}"),
    (r"1,\!000", r"\boxed{1,000}"),
    ("1000", r"\boxed{1\,000}"),
    ("1000", r"\boxed{1{,}000}"),
    ("1000", r"\boxed{10^3}"),
    ("2516_8", r"\boxed{2516_8}"),
    ("2516_8", "The answer is $2516_8$."),
    (r"90^\circ", "The answer is 90 degrees."),
    (r"90^\circ", r"\boxed{90}"),
    (r"90^\circ", r"The answer is $90^\circ$."),
    (r"90^\circ", "The answer is 90°."),
    (r"\$32,\!348", r"\boxed{\$32,348}"),
    (r"5.4 \text{ cents}", r"\boxed{5.4}"),
    (r"5.4 \text{ cents}", "The answer is 5.4 cents."),
    ("-2", "The answer is $-2$."),
    ("-2", "The answer is −2."),
    ("-2", "The answer is x = -2."),
    (r"3 \pm 2\sqrt{2}", r"\boxed{3 + 2\sqrt2, 3 - 2\sqrt2}"),
    ("6 - 5i", r"\boxed{6-5i}"),
    ("6 - 5i", "The answer is 6 - 5i."),
    ("y = 2x + 3", r"\boxed{y=2x+3}"),
    ("4", "#### 1. Set up\n$x+1=5$\n#### 2. Solve\n$$\\boxed{4}$$"),
    ("4", "The answer is 4 (A)."),
    ("4", r"Mark your solution with \boxed. So x is 4."),
    ("4", r"\boxed{4} \quad \text{(all 3 roots)}"),
    (r"\text{Evelyn}", r"Evelyn is fastest. \boxed{\text{Evelyn}}"),
]

MATH_WRONG = [
    (r"\frac{1}{2}", r"The answer is $\frac{1}{3}$, not $\frac{1}{2}$."),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{2}} Wait, that's wrong. \boxed{\frac13}"),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{2}} or \boxed{\frac{1}{3}}"),
    (r"\frac{1}{2}", r"\boxed{\frac{2}{1}}"),
    (r"\frac{1}{2}", r"\boxed{-\frac{1}{2}}"),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{2}x}"),
    (r"\frac{1}{2}", r"The answer is $\frac{1}{2}$ or $\frac{1}{3}$."),
    (r"\frac{1}{2}", r"\boxed{\frac{1}{2}, \frac13}"),
    (r"\frac{1}{2}", r"\boxed{1}{2}"),
    (r"\frac{1}{2}", "The answer is 12."),
    (r"\frac{1}{2}", r"\boxed{0.55}"),
    (r"\frac{1}{2}", r"First $\frac12$, then $\frac13$."),
    ("3,5", r"\boxed{3}"),
    ("3,5", r"\boxed{3} and \boxed{6}"),
    ("3,5", r"\boxed{3,5,7}"),
    ("3,5", r"\boxed{35}"),
    ("3,5", "The answer is 3.5"),
    ("5", r"\boxed{3} and \boxed{5}"),
    ("5", r"\boxed{5!}"),
    ("5", r"\boxed{5x}"),
    ("5", r"\boxed{5\pi}"),
    ("5", r"\boxed{5\sqrt{2}}"),
    ("5", r"\boxed{5i}"),
    ("5", r"\boxed{5_8}"),
    ("5", r"\boxed{50}"),
    ("5", r"\boxed{-5}"),
    ("5", r"\boxed{\pm 5}"),
    ("5", r"\boxed{5, -5}"),
    ("5", r"\boxed{(5, 0)}"),
    ("5", r"\boxed{[0, 5]}"),
    ("5", r"\boxed{x \le 5}"),
    ("5", r"\boxed{5 + 2i}"),
    ("5", r"\boxed{5^2}"),
    ("5", r"\boxed{\frac{5}{2}}"),
    ("5", r"\boxed{\log 5}"),
    ("5", r"The answer is $5 + \sqrt{2}$."),
    ("5", "The answer is $x = 5$ and $y = 6$."),
    ("5", "The answer is (5, 6)."),
    ("5", "The answer is 5x + 2."),
    ("5", "The answer is $5x + 2$."),
    ("(3,4)", "The answer is (4, 3)."),
    ("(3,4)", r"\boxed{[3,4]}"),
    ("(3,4)", r"\boxed{(3,4,5)}"),
    ("p - q", r"\boxed{q-p}"),
    ("p - q", r"\boxed{p+q}"),
    (r"\text{east}", r"\boxed{\text{west}}"),
    (r"\text{east}", "The answer is west, not east."),
    (r"\text{(C)}", r"\boxed{\text{(B)}}"),
    (r"2\sqrt{3}", r"\boxed{3.46}"),
    (r"2\sqrt{3}", r"\boxed{3\sqrt2}"),
    (r"\pi", r"\boxed{3.14}"),
    ("x^2+2x+1", r"\boxed{x^2+2x}"),
    ("[2,5)", r"\boxed{(2,5)}"),
    ("[2,5)", r"\boxed{[2,5]}"),
    (r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\boxed{\begin{pmatrix} 2 \\ 1 \end{pmatrix}}"),
    ("1000", r"\boxed{100}"),
    ("2516_8", r"\boxed{2516_{10}}"),
    (r"90^\circ", r"\boxed{80^\circ}"),
    ("-2", r"\boxed{2}"),
    ("6 - 5i", r"\boxed{6+5i}"),
]


def accuracy(task, reference, completion, prompt=""):
    return task.score(Example("0", prompt, reference), until_stop(completion, task.stop))["accuracy"]


def test_the_tables_are_large_and_a_third_of_them_is_wrong():
    for right, wrong, least in ((GSM8K_RIGHT, GSM8K_WRONG, 80), (MATH_RIGHT, MATH_WRONG, 40)):
        assert len(right) + len(wrong) == len({*right, *wrong}) >= least
        assert len(wrong) >= (len(right) + len(wrong)) / 3


@pytest.mark.parametrize(("reference", "completion"), GSM8K_RIGHT)
def test_a_right_answer_to_gsm8k_counts(reference, completion):
    assert accuracy(GSM8K, reference, completion) == 1.0


@pytest.mark.parametrize(("reference", "completion"), GSM8K_WRONG)
def test_a_wrong_answer_to_gsm8k_does_not_count(reference, completion):
    assert accuracy(GSM8K, reference, completion) == 0.0


@pytest.mark.parametrize(("reference", "completion"), MATH_RIGHT)
def test_a_right_answer_to_math_counts(reference, completion):
    assert accuracy(MATH500, reference, completion) == 1.0


@pytest.mark.parametrize(("reference", "completion"), MATH_WRONG)
def test_a_wrong_answer_to_math_does_not_count(reference, completion):
    assert accuracy(MATH500, reference, completion) == 0.0


@pytest.mark.parametrize(
    ("question", "reference", "completion", "right"),
    [
        ("How many dozens of eggs are there?", "6", "There are 6 dozen.", 1.0),
        ("How many eggs are there?", "6", "There are 6 dozen.", 0.0),
        ("How many eggs are there?", "72", "There are 6 dozen.", 1.0),
        ("How much is it, in millions?", "60", "#### 60 million", 1.0),
        ("How much is it?", "60", "#### 60 million", 0.0),
    ],
)
def test_a_word_that_the_question_counts_in_does_not_multiply(question, reference, completion, right):
    assert accuracy(GSM8K, reference, completion, question) == right


FORMS = [
    "#### {n}",
    "The answer is {n}.",
    "The answer is **{n}** clips, for 3 of 4 were sold.",
    "The answer is {n}. As 5 + 4 = 9, the answer is correct.",
    "**Final Answer:** ${n}",
    "5 + 4 = 9, and so $9 - 3 = {n}$.",
    "\\[\\boxed{{{n}\\text{{ clips}}}}\\]",
    "#### 1. Add\n5 + 4 = 9\n#### 2. Take away\n= {n}\nThe answer is {n}.",
    "The answer is 98765. I made a mistake.\n#### {n}",
    "She has {n} left (5 + 4 less than before).",
]
WRITTEN = [str, "{:,}".format, lambda n: f"{n:,}".replace(",", "\u202f"), lambda n: f"{n}.00", lambda n: f"+{n}"]


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_right_for_its_number_however_written_and_wrong_for_its_neighbours(form):
    draw = random.Random(form)
    for number in (1, 10, 72, *(draw.randrange(2, 10**power) for power in range(1, 8))):
        for written in WRITTEN:
            completion = form.format(n=written(number))
            assert accuracy(GSM8K, str(number), completion) == 1.0, completion
            for other in (number + 1, -number, 10 * number, 1000 * number, number + 10000):
                assert accuracy(GSM8K, str(other), completion) == 0.0, (other, completion)


@pytest.mark.parametrize(
    ("text", "numeral"),
    [
        ("1,20,000 rupees", "120000"),
        ("$-3", "-3"),
        ("1.5 million", "1500000"),
        ("2 hundred thousand", "200000"),
        ("6 x 10^2 people", "600"),
        ("¾ of a cup", "3/4"),
        ("12 m/s", "12"),
        ("7/0", None),
        ("B12", None),
        ("12:30", "?"),
        ("5 feet 3 inches", "?"),
    ],
)
def test_a_number_is_read_with_all_that_belongs_to_it(text, numeral):
    assert stated(text, is_loose=False) == numeral


@pytest.mark.parametrize(
    ("words", "number"),
    [
        ("two hundred and five thousand and six", "205006"),
        ("minus three and a quarter", "-13/4"),
        ("Forty-two cats", "42"),
        ("one of them", None),
        ("someone", None),
    ],
)
def test_a_number_in_words_is_read(words, number):
    assert in_words(words) == number


@pytest.mark.parametrize("numeral", ["", "x", "1/0", "1" * 5000, "1e", "?"])
def test_what_is_no_numeral_has_no_value(numeral):
    assert value_of(numeral) is None


PIECES = [
    "the answer is ",
    "Answer:\n",
    "#### 1\n",
    "1,",
    "1 ",
    "- ",
    "= 1 ",
    "$1$ ",
    "**1** ",
    "(1) ",
    "wait, ",
    "two ",
    "\\boxed{1} ",
    "\u2028",
]


@pytest.mark.parametrize("piece", PIECES)
def test_whatever_is_repeated_is_read_within_seconds(piece):
    began = time.monotonic()
    assert accuracy(GSM8K, "98765", piece * (40_000 // len(piece))) == 0.0
    assert accuracy(MATH500, r"\frac{98765}{2}", piece * (40_000 // len(piece))) == 0.0
    assert time.monotonic() - began < TIMEOUT_S + 3


@pytest.mark.parametrize(("name", "task"), [("gsm8k/test", GSM8K), ("gsm8k/train", GSM8K), ("math500/test", MATH500)])
def test_solutions_of_another_value_are_wrong(shared, name, task):
    lines = (shared / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:1500]]
    examples = [task.read(row, number) for number, row in enumerate(rows)]
    random.Random(0).shuffle(rows)
    for example, row in zip(examples, rows, strict=True):
        other = task.read(row, 0)
        theirs, ours = value_of(other.reference), value_of(example.reference)
        if None not in (theirs, ours) and theirs != ours:
            assert task.score(example, other.answer)["accuracy"] == 0.0, (example.reference, other.answer)

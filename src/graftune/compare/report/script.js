(() => {
  const tip = document.createElement("div");
  tip.id = "tip";
  document.body.append(tip);
  for (const svg of document.querySelectorAll("svg.chart")) {
    const spots = [...svg.querySelectorAll("circle")].map((spot) => {
      const title = spot.querySelector("title");
      const text = title.textContent;
      title.remove();
      return { spot, text, x: +spot.getAttribute("cx"), y: +spot.getAttribute("cy") };
    });
    let at = null;
    const leave = () => { at?.spot.classList.remove("at"); at = null; tip.style.display = "none"; };
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect();
      const scale = 480 / box.width;
      const x = (event.clientX - box.left) * scale, y = (event.clientY - box.top) * scale;
      let near = null, least = Infinity;
      for (const one of spots) {
        const far = (one.x - x) ** 2 * 4 + (one.y - y) ** 2;
        if (far < least) { least = far; near = one; }
      }
      if (near !== at) { at?.spot.classList.remove("at"); near.spot.classList.add("at"); at = near; }
      tip.textContent = near.text;
      tip.style.display = "block";
      const left = Math.min(event.clientX + 14, innerWidth - tip.offsetWidth - 6);
      tip.style.left = Math.max(6, left) + "px";
      tip.style.top = Math.max(6, event.clientY - 34) + "px";
    });
  }
  const key = (row, index) => {
    const text = row.cells[index].dataset.v ?? row.cells[index].textContent.trim();
    const value = parseFloat(text.replace(/,/g, ""));
    return Number.isNaN(value) ? text : value;
  };
  for (const table of document.querySelectorAll("table.sortable")) {
    [...table.tHead.rows[0].cells].forEach((head, index) => {
      head.setAttribute("aria-sort", "none");
      head.tabIndex = 0;
      const sort = () => {
        const up = head.getAttribute("aria-sort") !== "ascending";
        for (const other of table.tHead.rows[0].cells) other.setAttribute("aria-sort", "none");
        head.setAttribute("aria-sort", up ? "ascending" : "descending");
        const rows = [...table.tBodies[0].rows].sort((a, b) => {
          const x = key(a, index), y = key(b, index);
          return (x < y ? -1 : x > y ? 1 : 0) * (up ? 1 : -1);
        });
        table.tBodies[0].append(...rows);
      };
      head.addEventListener("click", sort);
      head.addEventListener("keydown", (event) => { if (event.key === "Enter") sort(); });
    });
  }
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = [...document.querySelectorAll("details:not([open])")];
    for (const one of closed) one.open = true;
  });
  addEventListener("afterprint", () => { for (const one of closed) one.open = false; });
})();

-- Quarto's filter that names the cells with C++ in a string, which cppython.xml colours.
function CodeBlock(block)
  local holds = block.text:find('[^+]= *r?"""\n') or block.text:find('"""extern ')
  if not (holds and block.classes:includes("python")) then return end
  block.classes = block.classes:map(function(name) return name == "python" and "cppython" or name end)
  return block
end

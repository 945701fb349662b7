"""Libraries: a kernel is optimised and made machine code once, as a whole.

Numba compiles each function to a *library*, an LLVM module: a helper, the body of a parallel loop, what calls that body
from a thread, the kernel around them.  It optimises each and makes machine code of each; then links them into whatever
calls them, and does both again there.  Of the body of a parallel loop that makes four times, of what it calls more; of
all that machine code only the kernel's is ever called.

Here a library that is part of another one stays as it was written, and the one whose address is asked for is linked
from all of its parts, optimised and translated: a third of the time of a cold start (docs/log.md).  What is computed
is the same.  Numba's own way stays Numba's for whatever is compiled elsewhere in the process.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.core.environment import lookup_environment

__all__ = ["KernelCompiler"]

ENVIRONMENT = "_ZN08NumbaEnv"  # begins the names of variables in which a function finds what it needs to raise an error
BODY = "__numba_parfor_gufunc"  # begins the names of the bodies of parallel loops, which Python does not call


class _Library(JITCodeLibrary):  # type: ignore[misc]
    """A library that is finished when its machine code is asked for."""

    def _ensure_finalized(self) -> None:
        """Do nothing: it is of parts that this is asked, by what they are put into."""

    def _finish(self) -> None:
        if not self._finalized:
            self._linking_libraries = self._parts()
            self.finalize()
            for variable in self._final_module.global_variables:
                environment = lookup_environment(variable.name) if variable.name.startswith(ENVIRONMENT) else None
                if environment is not None:
                    self.codegen.set_env(variable.name, environment)

    def _parts(self) -> list[Any]:
        """Return the libraries of which this one is made, and theirs: each once, and before those that it calls.

        For LLVM takes from what it links only what is called by what is there already.
        """
        found = dict[Any, None]()

        def visit(library: Any) -> None:
            if isinstance(library, _Library) and not library._finalized:
                for part in library._linking_libraries:
                    if part not in found:
                        visit(part)
            found[library] = None

        visit(self)
        return list(found)[-2::-1]  # all but this one

    @property
    def has_dynamic_globals(self) -> bool:
        self._finish()
        return bool(super().has_dynamic_globals)

    def get_pointer_to_function(self, name: str) -> int:
        """Return the address of a function; 0 if it is not one of this library, or of a part that only others call."""
        if not self._finalized and (self.name.startswith(BODY) or not self._defines(name)):
            return 0
        self._finish()
        return int(super().get_pointer_to_function(name))

    def _defines(self, name: str) -> bool:
        try:
            return not self._final_module.get_function(name).is_declaration
        except NameError:
            return False

    def get_defined_functions(self) -> Any:
        self._finish()
        return super().get_defined_functions()

    def serialize_using_bitcode(self) -> Any:
        self._finish()
        return super().serialize_using_bitcode()

    def serialize_using_object_code(self) -> Any:
        self._finish()
        return super().serialize_using_object_code()


@contextlib.contextmanager
def _parts_unfinished(codegen: Any) -> Iterator[None]:
    """Make libraries in the block that are finished when their machine code is asked for."""
    if "_library_class" in vars(codegen):  # a kernel that is compiled while another one is
        yield
        return

    def set_environment(name: str, environment: Any) -> None:
        if codegen._engine.is_symbol_defined(name):  # not yet where a part is to be linked
            type(codegen).set_env(codegen, name, environment)

    codegen._library_class, codegen.set_env = _Library, set_environment
    try:
        yield
    finally:
        del codegen._library_class, codegen.set_env


class KernelCompiler(Compiler):  # type: ignore[misc]
    """Numba's compiler, which holds its lock meanwhile."""

    def compile_extra(self, function: Any) -> Any:
        """Compile a function."""
        with _parts_unfinished(self.state.targetctx.codegen()):
            return super().compile_extra(function)
